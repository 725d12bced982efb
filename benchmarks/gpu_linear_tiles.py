"""Which tiles read weights fastest? Bandwidth of the decode step's matrix products, beside torch's (cuBLAS).

    python benchmarks/gpu_linear_tiles.py [--preset 4b] [--batch 1] [--fp8] [--tensor-parallel 1]

One JSON line per product: GB/s with the tiles in use, with cuBLAS (bf16), and with the best three of those tried. Each
product is timed over copies of its weight that do not fit into the L2 cache together, replayed as one CUDA graph. A
better tile than the one in use belongs into ``inference/triton_ops.py``.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mcore.inference import triton_ops
from cosmos_mcore.inference.triton_ops import Tiles
from cosmos_mcore.inference.weights import Matrix, quantize
from cosmos_mcore.model.presets import PRESETS

CACHE_BYTES = 2**28  # several times the L2 cache of an H100


def microseconds(calls: list[Callable[[], Tensor]]) -> float:
    """Time of one call, as a part of one graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e3 / len(calls))
    return best


def main() -> None:
    """Times every product of a preset's layer and its head."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="4b", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--fp8", action="store_true")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    args = parser.parse_args()
    arch, tp = PRESETS[args.preset], args.tensor_parallel
    heads = arch.num_attention_heads * arch.kv_channels
    products = {
        "qkv": (heads + 2 * arch.num_query_groups * arch.kv_channels, arch.hidden_size, False),
        "proj": (arch.hidden_size * tp, heads // tp, False),
        "fc1": (2 * arch.ffn_hidden_size, arch.hidden_size, True),
        "fc2": (arch.hidden_size * tp, arch.ffn_hidden_size // tp, False),
        "head": (arch.vocab_size, arch.hidden_size, False),
    }
    for name, (rows, inner, gated) in products.items():
        weight = torch.randn(rows // tp, inner, dtype=torch.bfloat16, device="cuda")
        matrix = quantize(weight) if args.fp8 and name != "head" else Matrix(weight)
        copies = 1 + CACHE_BYTES // matrix.data.nbytes
        matrices = [Matrix(matrix.data.clone(), matrix.scale) for _ in range(copies)]
        x = torch.randn(args.batch, inner, dtype=torch.bfloat16, device="cuda")
        norm = torch.ones(inner, dtype=torch.bfloat16, device="cuda") if name in ("qkv", "fc1", "head") else None
        table = triton_ops.GATED_TILES if gated else triton_ops.TILES
        size = matrix.data.element_size()

        def gb_per_s(call: Callable[[Matrix], Tensor], of: list[Matrix]) -> float:
            time = microseconds([lambda each=each: call(each) for each in of])  # type: ignore[misc]
            return round(of[0].data.nbytes / time / 1e3, 1)

        def ours(each: Matrix, x: Tensor = x, norm: Tensor | None = norm, gated: bool = gated) -> Tensor:
            return triton_ops.linear(x, each, norm=norm, eps=1e-5, gated=gated)

        used = table[size]
        results = {}
        shapes = ((16, 256), (16, 512), (32, 128), (32, 256), (32, 512), (64, 128), (64, 256))
        for (channels, inputs), warps, stages in itertools.product(shapes, (2, 4, 8), (3, 4, 6)):
            tiles = Tiles(channels, inputs, warps, stages)
            table[size] = tiles
            try:
                results[tiles] = gb_per_s(ours, matrices)
            except Exception as error:  # most likely too much shared memory
                if "out of resource" not in str(error):
                    raise
        table[size] = used
        dense = [Matrix(weight.clone()) for _ in range(1 + CACHE_BYTES // weight.nbytes)]
        line = {
            "product": name,
            "shape": [rows // tp, inner],
            "weight": str(matrix.data.dtype),
            "used": [*used, gb_per_s(ours, matrices)],
            "cublas": gb_per_s(lambda each, x=x: F.linear(x, each.data), dense),  # type: ignore[misc]
            "best": [[*tiles, speed] for tiles, speed in sorted(results.items(), key=lambda pair: -pair[1])[:3]],
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
