"""The parts of the decode step on GPUs, at the speed of memory: the functions of ``torch_ops`` as Triton kernels.

None of them asks the device for a value, so the whole step can be captured in one CUDA graph. Tile sizes follow from
shapes alone, not from timing: the same seed gives the same video in every run on the same kind of GPU.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos_mcore.inference import triton_draw_kernels as draw_kernels
from cosmos_mcore.inference import triton_kernels as kernels
from cosmos_mcore.inference.sampling import SMALLEST_TEMPERATURE, SamplingOptions
from cosmos_mcore.inference.weights import Matrix

MAX_ROWS = 16  # two of the tensor cores' smallest tiles; with more, sums would take the registers of loads
ATTEND_PROGRAMS = 128  # one per SM of an H100, with as many keys and values on the way as its shared memory holds
_ATTEND_WARPS = 4  # attend_kernel counts on 128 threads
_SAMPLE_BLOCK = 1024
_ROUNDS = 6  # of 32 ways: 2^30, all floats from 0 to 1
# While kernels change, so many bytes of what the next one reads come into the L2 cache: about 4 us of an H100's memory,
# a quarter of its L2. With several sequences in bf16, more is faster (docs/log.md).
AHEAD_BYTES, BATCH_AHEAD_BYTES = 12 * 2**20, 20 * 2**20
_SMS, _SHARED = 132, 220 * 2**10  # of an H100: multiprocessors, and the bytes that each has for its programs
# A kernel starts up while the one before still runs (programmatic dependent launch, from Hopper on): about a
# microsecond each for some 120 kernels per step. Triton can say so from 3.4 on (torch 2.8).
OVERLAP = (
    torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0) and hasattr(tl.extra.cuda, "gdc_wait")
)


class Tiles(NamedTuple):
    """How a product is cut: channels and inputs per step of a program, warps that share the inputs, steps at a time."""

    n: int
    k: int
    warps: int
    stages: int


# By the bytes of a weight. At 3 TB/s some 25 KiB on the way per SM bridge memory's latency; the smallest product of the
# 4B (4,096 channels) is one program per SM, and has 32 KiB on the way beside the 16 that it works on.
TILES = {4: Tiles(32, 128, 4, 3), 2: Tiles(32, 256, 4, 4), 1: Tiles(32, 256, 4, 6)}
# Two matrices at once. All 896 programs of the 4B's (and its siblings') fit an H100 at once, seven per SM: with three
# per SM, the last few of a second round would read alone.
GATED_TILES = {4: Tiles(32, 64, 4, 3), 2: Tiles(16, 128, 2, 4), 1: Tiles(16, 256, 1, 3)}
# What makes steps of the 4B faster (benchmarks/decode_tiles.py, H100), by channels, inputs, bytes of a weight, gated.
BEST_TILES: dict[tuple[int, int, int, bool], Tiles] = {
    (6144, 4096, 2, False): Tiles(16, 256, 2, 6),
    (4096, 4096, 2, False): Tiles(16, 512, 4, 4),
    (4096, 14336, 2, False): Tiles(16, 512, 4, 3),
    (6144, 4096, 1, False): Tiles(32, 512, 4, 3),
    (4096, 4096, 1, False): Tiles(16, 512, 4, 6),
    (4096, 14336, 1, False): Tiles(32, 256, 2, 6),
}


@cache
def _attend_block_bytes() -> int:
    """Of keys and values: what a program of ``attend_kernel`` takes at a time. It has three such blocks on the way."""
    if not torch.cuda.is_available():
        return 2**15
    shared = getattr(torch.cuda.get_device_properties(), "shared_memory_per_block_optin", 0)  # new in torch 2.5
    return 2**16 if shared > 200_000 else 2**15


def _ahead_bytes(rows: int) -> int:
    return AHEAD_BYTES if rows == 1 else BATCH_AHEAD_BYTES


def _launch() -> dict[str, bool]:
    return {"OVERLAP": True, "launch_pdl": True} if OVERLAP else {"OVERLAP": False}


def tiles_of(channels: int, inner: int, size: int, gated: bool) -> Tiles:
    """How ``linear`` cuts a product: [channels, inner] weights of ``size`` bytes, two such matrices if gated."""
    return BEST_TILES.get((channels, inner, size, gated)) or (GATED_TILES if gated else TILES)[size]


def _fetched(wanted: int, most: int, stride: int) -> int:
    """Bytes that each thread fetches ahead: about so many, in whole lines of 128, from multiples of 16."""
    return 0 if stride % 16 else min(triton.cdiv(wanted, 128), most // 128) * 128


def linear(
    x: Tensor,
    weight: Matrix,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As ``torch_ops.linear``, for at most ``MAX_ROWS`` rows; sums in float32."""
    rows, inner = x.shape
    assert rows <= MAX_ROWS and x.is_contiguous() and weight.data.is_contiguous()
    matrices = 2 if gated else 1
    channels, size = len(weight.data) // matrices, weight.data.element_size()
    out = torch.empty(rows, channels, dtype=dtype or x.dtype, device=x.device)
    tiles = tiles_of(channels, inner, size, gated)
    grid = triton.cdiv(channels, tiles.n)
    columns = 32 * tiles.warps // tiles.n  # threads per channel, as they fetch
    resident = _SMS * max(1, _SHARED // (tiles.stages * tiles.k * tiles.n * size * matrices))  # programs at once
    ahead = min(inner, _ahead_bytes(rows) // (min(grid, resident) * tiles.n * size * matrices))
    kernels.linear_kernel[(grid,)](
        x,
        weight.data,
        weight.data if weight.scale is None else weight.scale,
        x if norm is None else norm,
        x if residual is None else residual,
        out,
        rows,
        channels,
        inner,
        eps,
        ahead,
        _fetched(ahead * size // columns, inner * size // columns, inner * size),
        NORM=norm is not None,
        GATED=gated,
        SCALED=weight.scale is not None,
        HALF=weight.scale is not None and x.dtype is torch.bfloat16,
        RESIDUAL=residual is not None,
        BLOCK_M=8 if rows <= 8 else MAX_ROWS,
        BLOCK_N=tiles.n,
        BLOCK_K=tiles.k,
        SPLIT=tiles.warps,
        **_launch(),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return out


def attend(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
) -> Tensor:
    """As ``torch_ops.attend``: parts of the cache in parallel (split KV), then combined."""
    batch, groups, capacity, size = keys.shape
    queries = qkv.size(1) // (groups * size) - 2
    heads = groups * queries
    splits = min(64, max(1, 2 ** round(math.log2(ATTEND_PROGRAMS / (batch * groups)))))
    partial = torch.empty(batch * heads * splits, size, dtype=torch.float32, device=qkv.device)
    maxima, sums = torch.empty(2, batch * heads * splits, dtype=torch.float32, device=qkv.device)
    block_d = max(16, triton.next_power_of_2(size))
    position_bytes = 2 * size * keys.element_size()  # of keys and values
    ahead = _ahead_bytes(batch) // (batch * groups * splits * position_bytes)
    kernels.attend_kernel[(batch * groups, splits)](
        qkv,
        keys,
        values,
        position,
        cos,
        sin,
        q_norm,
        k_norm,
        partial,
        maxima,
        sums,
        capacity,
        math.log2(math.e) / math.sqrt(size),
        eps,
        ahead,
        _fetched(ahead * position_bytes // 256, capacity * position_bytes // 256, size * keys.element_size()),
        QUERIES=queries,
        SIZE=size,
        BLOCK_Q=max(16, triton.next_power_of_2(queries)),
        BLOCK_D=block_d,
        BLOCK_S=min(128, _attend_block_bytes() // (2 * block_d * keys.element_size())),
        SPLITS=splits,
        **_launch(),
        num_warps=_ATTEND_WARPS,
        num_stages=3,
    )
    out = torch.empty(batch, heads * size, dtype=qkv.dtype, device=qkv.device)
    kernels.combine_kernel[(batch * heads,)](
        partial, maxima, sums, out, SIZE=size, BLOCK_D=block_d, SPLITS=splits, num_warps=4, **_launch()
    )
    return out


class _Draw:
    """The scratch memory of one call of ``sample``, and the kernels on it; a row in chunks, one program each."""

    def __init__(self, logits: Tensor) -> None:
        self.rows, self.vocabulary = logits.shape
        self.block = min(_SAMPLE_BLOCK, triton.next_power_of_2(self.vocabulary))
        self.chunks = triton.cdiv(self.vocabulary, self.block)
        self.sizes: dict[str, Any] = {"BLOCK": self.block, "BLOCK_C": triton.next_power_of_2(self.chunks), **_launch()}
        self.device = logits.device
        self.shares = torch.empty_like(logits)
        self.sums, self.bounds, self.weights = self.floats(), self.integers(2), self.floats()

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(self.rows, self.chunks, *shape, dtype=torch.float32, device=self.device)

    def integers(self, count: int) -> Tensor:
        return torch.empty(self.rows, count, dtype=torch.int32, device=self.device)

    def launch(self, kernel: Any, *arguments: Any, **options: Any) -> None:
        kernel[(self.chunks, self.rows)](*arguments, **options, **self.sizes, num_warps=4)

    def narrow(self, limit: float, count: bool) -> None:
        """Finds the bounds of a threshold; the last time, they are left for the next kernel to narrow."""
        for number in range(_ROUNDS):
            bounds, weights = self.integers(2), self.floats(draw_kernels.WAYS.value)
            before = self.shares, self.sums, self.bounds, self.weights
            sizes = bounds, weights, self.vocabulary, self.chunks, limit
            self.launch(draw_kernels.narrow_kernel, *before, *sizes, COUNT=count, NARROW=number > 0)
            self.bounds, self.weights = bounds, weights


def sample(logits: Tensor, options: SamplingOptions, seeds: Tensor, position: Tensor) -> Tensor:
    """As ``torch_ops.sample``; its random numbers are others than on a CPU.

    Each step of the search for a threshold is a kernel of its own, of many programs: one program for a row would take
    as long as reading 0.4 GB.
    """
    rows, vocabulary = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    greedy = options.temperature == 0
    draw = _Draw(logits)
    largest = draw.floats()
    draw_kernels.largest_kernel[(draw.chunks, rows)](
        logits, largest, vocabulary, draw.chunks, BLOCK=draw.block, **_launch(), num_warps=4
    )
    start = logits, largest, draw.shares, draw.sums, draw.bounds, vocabulary, draw.chunks
    draw.launch(draw_kernels.shares_kernel, *start, 1.0 / max(options.temperature, SMALLEST_TEMPERATURE), GREEDY=greedy)
    if not greedy and options.top_k is not None and options.top_k < vocabulary:
        draw.narrow(options.top_k - 0.5, True)
        before = draw.shares, draw.sums, draw.bounds, draw.weights
        draw.sums, draw.bounds = draw.floats(), draw.integers(2)
        sizes = draw.sums, draw.bounds, vocabulary, draw.chunks, options.top_k - 0.5
        draw.launch(draw_kernels.cut_kernel, *before, *sizes)
    top_p = None if greedy else options.top_p
    if top_p is not None:
        draw.narrow(top_p, False)
    winners, tokens = draw.floats(), draw.integers(draw.chunks)
    before = draw.shares, draw.sums, draw.bounds, draw.weights
    rest = winners, tokens, seeds, position, vocabulary, draw.chunks, top_p or 0.0
    draw.launch(draw_kernels.draw_kernel, *before, *rest, GREEDY=greedy, NARROW=top_p is not None)
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    draw_kernels.pick_kernel[(rows,)](
        winners, tokens, token, draw.chunks, BLOCK_C=draw.sizes["BLOCK_C"], **_launch(), num_warps=4
    )
    return token
