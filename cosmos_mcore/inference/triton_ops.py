"""The parts of the decode step on GPUs, at the speed of memory: the functions of ``torch_ops`` as Triton kernels.

None of them asks the device for a value, so the whole step can be captured in one CUDA graph. Tile sizes follow from
shapes alone, not from timing: the same seed gives the same video in every run on the same kind of GPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from cosmos_mcore.inference import triton_kernels as kernels
from cosmos_mcore.inference.sampling import SMALLEST_TEMPERATURE, SamplingOptions
from cosmos_mcore.inference.weights import Matrix

MAX_ROWS = 16  # two of the tensor cores' smallest tiles; with more, sums would take the registers of loads
_ATTEND_BLOCK = 64
ATTEND_PROGRAMS = 256  # about two per SM of an H100
_SAMPLE_BLOCK = 8192
# A kernel starts up while the one before still runs (programmatic dependent launch, from Hopper on): about a
# microsecond each for some 120 kernels per step.
OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


class Tiles(NamedTuple):
    """How a product is cut: channels and inputs per step of a program, warps that share the inputs, steps at a time."""

    n: int
    k: int
    warps: int
    stages: int


# By the bytes of a weight. At 3 TB/s some 25 KiB on the way per SM bridge memory's latency; the smallest product of the
# 4B (4,096 channels) is one program per SM, and has 32 KiB on the way beside the 16 that it works on.
TILES = {4: Tiles(32, 128, 4, 3), 2: Tiles(32, 256, 4, 4), 1: Tiles(32, 256, 4, 6)}
GATED_TILES = {4: Tiles(32, 64, 4, 3), 2: Tiles(32, 128, 4, 4), 1: Tiles(32, 256, 4, 4)}  # two matrices at once


def _launch() -> dict[str, bool]:
    return {"OVERLAP": True, "launch_pdl": True} if OVERLAP else {"OVERLAP": False}


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
    channels = len(weight.data) // (2 if gated else 1)
    out = torch.empty(rows, channels, dtype=dtype or x.dtype, device=x.device)
    tiles = (GATED_TILES if gated else TILES)[weight.data.element_size()]
    kernels.linear_kernel[(triton.cdiv(channels, tiles.n),)](
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
        QUERIES=queries,
        SIZE=size,
        BLOCK_Q=max(16, triton.next_power_of_2(queries)),
        BLOCK_D=block_d,
        BLOCK_S=_ATTEND_BLOCK,
        SPLITS=splits,
        **_launch(),
        num_warps=4,
        num_stages=3,
    )
    out = torch.empty(batch, heads * size, dtype=qkv.dtype, device=qkv.device)
    kernels.combine_kernel[(batch * heads,)](
        partial, maxima, sums, out, SIZE=size, BLOCK_D=block_d, SPLITS=splits, num_warps=4, **_launch()
    )
    return out


def sample(logits: Tensor, options: SamplingOptions, seeds: Tensor, position: Tensor) -> Tensor:
    """As ``torch_ops.sample``, from one kernel; its random numbers are others than on a CPU."""
    rows, vocabulary = logits.shape
    assert logits.dtype == torch.float32 and logits.is_contiguous()
    token = torch.empty(rows, dtype=torch.int64, device=logits.device)
    greedy = options.temperature == 0
    top_k = options.top_k if options.top_k is not None and options.top_k < vocabulary else None
    kernels.sample_kernel[(rows,)](
        logits,
        torch.empty_like(logits),
        token,
        seeds,
        position,
        vocabulary,
        1.0 / max(options.temperature, SMALLEST_TEMPERATURE),
        0.0 if options.top_p is None else options.top_p,
        float(top_k or 0),
        GREEDY=greedy,
        TOP_P=options.top_p is not None,
        TOP_K=top_k is not None,
        BLOCK=min(_SAMPLE_BLOCK, triton.next_power_of_2(vocabulary)),
        **_launch(),
        num_warps=32,
    )
    return token
