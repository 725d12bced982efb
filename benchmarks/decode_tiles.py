"""Which tiles make a step of generation fastest? Each is tried in whole captured steps, on one GPU.

    python benchmarks/decode_tiles.py [--preset 4b] [--cases 1 8 1:fp8 8:fp8] [--products fc1 fc2 qkv proj head]

One JSON line per product and precision: milliseconds of a step of each case with the tiles in use and with those
tried, the fastest first (by the mean over the cases, each relative to its first time). What is faster by half a
percent, seen twice, stays for the products that follow, and belongs into ``BEST_TILES`` of ``inference/triton_ops.py``.
The last lines do the same for the bytes read ahead. Some four minutes per precision.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from generate import build, in_fp8
from train_step import environment

from cosmos_mcore.inference import triton_ops
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.triton_ops import Tiles
from cosmos_mcore.inference.weights import FP8, Matrix
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.parallel.initialize import shut_down

PRODUCTS = ["fc1", "fc2", "qkv", "proj", "head"]
GAIN = 0.995
AHEAD_MIB = [6, 9, 12, 16, 20, 26]
# By the bytes of a weight, then gated ones.
CANDIDATES = {
    (2, False): [
        *[Tiles(16, 128, 2, 6), Tiles(16, 256, 2, 4), Tiles(16, 256, 2, 6), Tiles(16, 256, 4, 4), Tiles(16, 512, 4, 3)],
        *[Tiles(16, 512, 4, 4), Tiles(32, 128, 2, 6), Tiles(32, 256, 2, 4), Tiles(32, 256, 4, 3), Tiles(32, 256, 4, 4)],
        *[Tiles(32, 512, 4, 3), Tiles(32, 512, 8, 3)],
    ],
    (2, True): [
        *[Tiles(16, 128, 2, 3), Tiles(16, 128, 2, 4), Tiles(16, 128, 2, 5), Tiles(16, 256, 2, 3), Tiles(16, 256, 4, 3)],
        *[Tiles(32, 64, 2, 4), Tiles(32, 128, 2, 2), Tiles(32, 128, 2, 3)],
    ],
    (1, False): [
        *[Tiles(16, 256, 2, 4), Tiles(16, 256, 2, 6), Tiles(16, 512, 2, 4), Tiles(16, 512, 4, 4), Tiles(16, 512, 4, 6)],
        *[Tiles(32, 256, 2, 4), Tiles(32, 256, 2, 6), Tiles(32, 256, 4, 4), Tiles(32, 512, 4, 3), Tiles(32, 512, 4, 4)],
    ],
    (1, True): [
        *[Tiles(16, 256, 1, 3), Tiles(16, 256, 2, 3), Tiles(16, 256, 2, 4), Tiles(16, 512, 2, 2), Tiles(32, 128, 1, 3)],
        *[Tiles(32, 128, 2, 3), Tiles(32, 256, 2, 2), Tiles(32, 256, 2, 3)],
    ],
}


class Product(NamedTuple):
    """One product of a layer, or the head: ``channels`` of ``inner`` inputs, of so many bytes a weight."""

    name: str
    channels: int
    inner: int
    size: int
    gated: bool

    def key(self) -> tuple[int, int, int, bool]:
        """Of ``BEST_TILES``."""
        return self.channels, self.inner, self.size, self.gated

    def tried(self) -> list[Tiles]:
        """The tiles in use, and those that are compared with them."""
        used = triton_ops.tiles_of(*self.key())
        return [used, *(tiles for tiles in CANDIDATES[self.size, self.gated] if tiles != used)]


def products(preset: str, fp8: bool, names: list[str]) -> list[Product]:
    """Those of one layer with weights of one precision; the head is never in 8 bits."""
    arch = PRESETS[preset]
    heads = arch.num_attention_heads * arch.kv_channels
    shapes = {
        "qkv": (heads + 2 * arch.num_query_groups * arch.kv_channels, arch.hidden_size),
        "proj": (arch.hidden_size, heads),
        "fc1": (arch.ffn_hidden_size, arch.hidden_size),
        "fc2": (arch.hidden_size, arch.ffn_hidden_size),
        "head": (arch.vocab_size, arch.hidden_size),
    }
    return [
        Product(name, *shapes[name], 1 if fp8 else 2, name == "fc1") for name in names if not (fp8 and name == "head")
    ]


def compile_one(product: Product, tiles: Tiles, batch: int) -> bool:
    """Runs a kernel once as a step would, so that it lies in Triton's cache; False if it cannot be run."""
    try:
        triton_ops.BEST_TILES[product.key()] = tiles
        data = torch.zeros(
            product.channels * (2 if product.gated else 1), product.inner, dtype=torch.bfloat16, device="cuda"
        )
        weight = Matrix(data) if product.size == 2 else Matrix(data.to(FP8), torch.ones(len(data), device="cuda"))
        x = torch.zeros(batch, product.inner, dtype=torch.bfloat16, device="cuda")
        triton_ops.linear(
            x,
            weight,
            norm=torch.ones_like(x[0]) if product.name in ("qkv", "fc1", "head") else None,
            eps=1e-5,
            gated=product.gated,
            residual=x.new_zeros(batch, product.channels) if product.name in ("proj", "fc2") else None,
            dtype=torch.float32 if product.name == "head" else None,
        )
        torch.cuda.synchronize()
    except Exception:  # most likely too much shared memory; the others go on
        return False
    return True


def milliseconds(network: CachedNetwork, batch: int, steps: int = 25) -> float:
    """Of one step in the middle of a clip, captured with the settings as they are: the best of three rounds."""
    generator = TokenGenerator(network, batch, SamplingOptions(1.0, 0.8))
    best = float("inf")
    for _ in range(3):
        generator._position.fill_(network.capacity * 2 // 3)
        generator.advance()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            generator.advance()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / steps)
    return round(best, 4)


def choose(settings: list[Any], use: Callable[[Any], None], measure: Callable[[], list[float]]) -> list[Any]:
    """Leaves the best in use: the first of ``settings``, or what beats it twice.

    Args:
        settings: the one in use, and others.
        use: switches to one.
        measure: milliseconds of each case.

    Returns:
        Relative time, setting and milliseconds of each, the fastest first.
    """

    def compare(setting: Any) -> tuple[float, Any, list[float]]:
        use(setting)
        times = measure()
        return round(sum(t / f for t, f in zip(times, first, strict=True)) / len(times), 4), setting, times

    use(settings[0])
    first = measure()
    results = sorted((compare(setting) for setting in settings), key=lambda result: result[0])
    best = results[0][1]
    use(settings[0])
    first = measure()
    if compare(best)[0] > GAIN:
        use(settings[0])
    return results


def main() -> None:
    """Tries the candidates of every product, then the bytes read ahead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, arch in PRESETS.items() if not arch.text_to_video]
    parser.add_argument("--preset", default="4b", choices=presets)
    parser.add_argument("--cases", nargs="+", default=["1", "8", "1:fp8", "8:fp8"])
    parser.add_argument("--products", nargs="*", choices=PRODUCTS, default=PRODUCTS)
    args = parser.parse_args()
    batches: dict[bool, list[int]] = {}
    for case in args.cases:
        batch, _, precision = case.partition(":")
        batches.setdefault(precision == "fp8", []).append(int(batch))
    todo = [
        (product, batch)
        for fp8 in batches
        for product in products(args.preset, fp8, args.products)
        for batch in batches[fp8]
    ]
    trials = [(product, tiles, batch) for product, batch in todo for tiles in product.tried()]
    workers = max(1, min(14, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        runs = pool.map(compile_one, *zip(*trials, strict=True)) if trials else []
        refused = {trial[:2] for trial, run in zip(trials, runs, strict=True) if not run}
    network = build(args.preset, (33, 640, 1024))
    for fp8, sizes in batches.items():
        tested = in_fp8(network) if fp8 else network

        def measure(tested: CachedNetwork = tested, sizes: list[int] = sizes) -> list[float]:
            return [milliseconds(tested, batch) for batch in sizes]

        def report(name: str, used: Any, results: list[Any], fp8: bool = fp8, sizes: list[int] = sizes) -> None:
            line = {"name": name, "fp8": fp8, "sequences": sizes, "used": used, "tried": results}
            print(json.dumps({**line, **environment()}), flush=True)

        for product in products(args.preset, fp8, args.products):
            key = product.key()
            settings = [tiles for tiles in product.tried() if (product, tiles) not in refused]
            results = choose(settings, lambda tiles, key=key: triton_ops.BEST_TILES.update({key: tiles}), measure)  # type: ignore[misc]
            report(product.name, triton_ops.BEST_TILES[key], results)
        for name in ("AHEAD_BYTES", "BATCH_AHEAD_BYTES"):
            settings = [getattr(triton_ops, name), *(mib * 2**20 for mib in AHEAD_MIB)]
            results = choose(settings, lambda size, name=name: setattr(triton_ops, name, size), measure)  # type: ignore[misc]
            report(name, getattr(triton_ops, name), results)
    shut_down()


if __name__ == "__main__":
    main()
