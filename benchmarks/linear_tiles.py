"""Which tiles read weights fastest? Bandwidth of the decode step's matrix products, beside torch's (cuBLAS).

    python benchmarks/linear_tiles.py OUTPUT.json [--preset 4b] [--cases 1 1:fp8 8] [--tensor-parallel 1]

One JSON line per product and case: GB/s with the tiles in use, with cuBLAS (bf16), and with each of those tried, the
best first. Each product is timed over copies of its weight that do not fit into the L2 cache together, replayed as one
CUDA graph. Tiles that are better than those in use by 2 % go to OUTPUT.json, for ``generate.py --tiles``; if
that is faster, they belong into ``BEST_TILES`` of ``inference/triton_ops.py``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mcore.inference import triton_ops
from cosmos_mcore.inference.triton_ops import Tiles
from cosmos_mcore.inference.weights import FP8, Matrix
from cosmos_mcore.model.presets import PRESETS

CACHE_BYTES = 2**28  # several times the L2 cache of an H100
# By the bytes of a weight, then gated ones.
CANDIDATES = {
    (2, False): [
        Tiles(16, 128, 2, 6),
        Tiles(16, 256, 2, 4),
        Tiles(16, 256, 4, 4),
        Tiles(16, 256, 4, 6),
        Tiles(16, 512, 4, 4),
        Tiles(32, 128, 2, 4),
        Tiles(32, 512, 8, 3),
    ],
    (2, True): [
        Tiles(16, 64, 2, 6),
        Tiles(16, 128, 1, 4),
        Tiles(16, 128, 2, 3),
        Tiles(16, 128, 2, 4),
        Tiles(16, 128, 2, 5),
        Tiles(16, 256, 2, 3),
        Tiles(16, 256, 4, 4),
    ],
    (1, False): [
        Tiles(16, 256, 2, 4),
        Tiles(16, 256, 2, 6),
        Tiles(16, 512, 2, 4),
        Tiles(16, 512, 4, 4),
        Tiles(16, 512, 4, 6),
        Tiles(32, 256, 2, 4),
        Tiles(32, 256, 4, 4),
    ],
    (1, True): [
        Tiles(16, 128, 2, 4),
        Tiles(16, 256, 1, 3),
        Tiles(16, 256, 2, 2),
        Tiles(16, 256, 2, 3),
        Tiles(16, 256, 2, 4),
        Tiles(16, 512, 2, 2),
        Tiles(16, 512, 4, 3),
    ],
}


class Product(NamedTuple):
    """One product of one case: ``weight`` [rows, inner], of so many bytes an element, for ``batch`` sequences."""

    name: str
    batch: int
    rows: int
    inner: int
    size: int
    gated: bool

    def key(self) -> tuple[int, int, int, bool]:
        """Of ``BEST_TILES``."""
        return self.rows // (2 if self.gated else 1), self.inner, self.size, self.gated

    def tiles_in_use(self) -> Tiles:
        """What triton_ops takes."""
        table = triton_ops.GATED_TILES if self.gated else triton_ops.TILES
        return triton_ops.BEST_TILES.get(self.key()) or table[self.size]

    def call(self, tiles: Tiles) -> Callable[[Matrix], Tensor]:
        """Multiplies with a weight."""
        triton_ops.BEST_TILES[self.key()] = tiles
        x = torch.randn(self.batch, self.inner, dtype=torch.bfloat16, device="cuda")
        norm = torch.ones_like(x[0]) if self.name in ("qkv", "fc1", "head") else None
        residual = x.new_ones(self.batch, self.rows) if self.name in ("proj", "fc2") else None
        dtype = torch.float32 if self.name == "head" else None
        return lambda each: triton_ops.linear(
            x, each, norm=norm, eps=1e-5, gated=self.gated, residual=residual, dtype=dtype
        )

    def weight(self) -> Matrix:
        """A random one."""
        data = torch.randn(self.rows, self.inner, dtype=torch.bfloat16, device="cuda")
        return Matrix(data) if self.size == 2 else Matrix(data.to(FP8), torch.ones(self.rows, device="cuda"))


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


def gb_per_s(call: Callable[[Matrix], Tensor], of: list[Matrix]) -> float:
    """Bytes of weights over time."""
    calls = [lambda each=each: call(each) for each in of]  # type: ignore[misc]
    return round(of[0].data.nbytes / microseconds(calls) / 1e3, 1)


def compile_one(product: Product, tiles: Tiles) -> str | None:
    """Runs a kernel once, so that it lies in Triton's cache; why it cannot be run."""
    try:
        product.call(tiles)(product.weight())
        torch.cuda.synchronize()
    except Exception as error:  # most likely too much shared memory; the others go on
        return repr(error)[:200]
    return None


def products(preset: str, case: str, tp: int) -> list[Product]:
    """All of one layer, and the head, which is never in 8 bits."""
    arch = PRESETS[preset]
    batch, _, precision = case.partition(":")
    heads = arch.num_attention_heads * arch.kv_channels
    shapes = {
        "qkv": ((heads + 2 * arch.num_query_groups * arch.kv_channels) // tp, arch.hidden_size),
        "proj": (arch.hidden_size, heads // tp),
        "fc1": (2 * arch.ffn_hidden_size // tp, arch.hidden_size),
        "fc2": (arch.hidden_size, arch.ffn_hidden_size // tp),
        "head": (arch.vocab_size // tp, arch.hidden_size),
    }
    fp8 = precision == "fp8"
    return [
        Product(name, int(batch), *shape, 1 if fp8 else 2, name == "fc1")
        for name, shape in shapes.items()
        if not (fp8 and name == "head")
    ]


def main() -> None:
    """Times every product of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", default="4b", choices=PRESETS)
    parser.add_argument("--cases", nargs="+", default=["1", "1:fp8", "8"])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    args = parser.parse_args()
    began = time.perf_counter()
    todo = [
        (product, [product.tiles_in_use(), *CANDIDATES[product.size, product.gated]])
        for case in args.cases
        for product in products(args.preset, case, args.tensor_parallel)
    ]
    pairs = [(product, tiles) for product, several in todo for tiles in several]
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        refused = dict(zip(pairs, pool.map(compile_one, *zip(*pairs, strict=True)), strict=True))
    print(json.dumps({"compiled": len(pairs), "seconds": round(time.perf_counter() - began, 1)}), flush=True)
    better: list[tuple[tuple[int, int, int, bool], Tiles]] = []
    for product, several in todo:
        weight = product.weight()
        copies = 2 + CACHE_BYTES // weight.data.nbytes
        matrices = [Matrix(weight.data.clone(), weight.scale) for _ in range(copies)]
        fitting = [tiles for tiles in several if refused[product, tiles] is None]
        speeds = {tiles: gb_per_s(product.call(tiles), matrices) for tiles in fitting}
        best = max(speeds, key=speeds.__getitem__)
        if speeds[best] > 1.02 * speeds.get(several[0], 0.0):
            better.append((product.key(), best))
        args.output.write_text(json.dumps(better))
        x = torch.randn(product.batch, product.inner, dtype=torch.bfloat16, device="cuda")
        line = {
            **product._asdict(),
            "used": [*several[0], speeds.get(several[0])],
            "cublas": gb_per_s(lambda each, x=x: F.linear(x, each.data), matrices) if product.size == 2 else None,  # type: ignore[misc]
            "tried": [[*tiles, speed] for tiles, speed in sorted(speeds.items(), key=lambda pair: -pair[1])],
            "refused": sum(reason is not None for (one, _), reason in refused.items() if one == product),
        }
        print(json.dumps(line), flush=True)
    print(json.dumps({"better": better, "seconds": round(time.perf_counter() - began, 1)}), flush=True)


if __name__ == "__main__":
    main()
