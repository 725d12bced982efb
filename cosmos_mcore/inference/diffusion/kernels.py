"""Triton kernels of the diffusion decoder's passes over memory: each number is read once and written once.

torch's own kernels for them reach 2.2 (layer norm) and 1.8 TB/s (compiled norm and rotation) of an H100's 3.
"""

# Triton compiles some of these functions from their source: types are those of Triton, annotations mean compile-time.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8  # of a program of the layer norm: one read of shift and scale is for all of them
_COLUMNS = 4096  # of a program that scales a matrix


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm of ``x`` [..., K], times one plus the scale [K], plus the shift [K]; computed in float32."""
    size = x.size(-1)
    rows = x.numel() // size
    assert x.is_contiguous() and shift.is_contiguous() and scale.is_contiguous()
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    _norm_kernel[(triton.cdiv(rows, _ROWS),)](x, shift, scale, out, rows, eps, size, block, _ROWS, num_warps=8)
    return out


def norm_heads(heads: Tensor, gain: Tensor, rotary: tuple[Tensor, Tensor] | None, eps: float) -> Tensor:
    """RMS normalisation of each head and its rotation, in place, computed in float32.

    Args:
        heads: [B, S, heads, head_dim], contiguous; is changed.
        gain: [head_dim].
        rotary: cosines and sines float32 [S, 1, head_dim / 2], or None: no rotation.
        eps: what is added to the mean square.

    Returns:
        ``heads``.
    """
    batch, positions, count, size = heads.shape
    assert heads.is_contiguous() and size % 2 == 0
    cos, sin = rotary or (gain, gain)
    assert rotary is None or (cos.is_contiguous() and sin.is_contiguous() and len(cos) == len(sin) == positions)
    blocks = triton.next_power_of_2(count), triton.next_power_of_2(size // 2)
    turned = rotary is not None
    _heads_kernel[(batch * positions,)](heads, gain, cos, sin, positions, eps, turned, count, size // 2, *blocks)
    return heads


def scale_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """``matrix`` [N, K] with each row times its factor [N]."""
    rows, size = matrix.shape
    assert matrix.is_contiguous() and factors.is_contiguous()
    out = torch.empty_like(matrix)
    _scale_kernel[(rows, triton.cdiv(size, _COLUMNS))](matrix, factors, out, size, _COLUMNS)
    return out


@triton.jit
def _norm_kernel(
    x, shift, scale, out, rows, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Each program: ROWS rows; the next one is on its way while one is computed."""
    channel = tl.arange(0, BLOCK)
    inside = channel < SIZE
    first = tl.program_id(0) * ROWS
    row = first.to(tl.int64)
    coming = tl.load(x + row * SIZE + channel, mask=inside, other=0.0)
    offset = tl.load(shift + channel, mask=inside, other=0.0)
    factor = tl.load(scale + channel, mask=inside, other=0.0)
    last = tl.minimum(first + ROWS, rows)
    for _ in range(first, last):
        values = coming.to(tl.float32)
        coming = tl.load(x + (row + 1) * SIZE + channel, mask=inside & (row + 1 < last), other=0.0)
        values = tl.where(inside, values - tl.sum(values, axis=0) / SIZE, 0.0)
        values *= tl.rsqrt(tl.sum(values * values, axis=0) / SIZE + eps)
        values = values * (1.0 + factor.to(tl.float32)) + offset.to(tl.float32)
        tl.store(out + row * SIZE + channel, values.to(out.dtype.element_ty), mask=inside)
        row += 1


@triton.jit
def _heads_kernel(
    heads,
    gain,
    cos,
    sin,
    positions,
    eps,
    TURNED: tl.constexpr,
    COUNT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program: the heads of one position of one row, first and second halves apart."""
    at = tl.program_id(0)
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    d_in = d < HALF
    inside = (h < COUNT) & d_in
    start = heads + at.to(tl.int64) * (COUNT * 2 * HALF) + h * (2 * HALF) + d
    a = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(start + HALF, mask=inside, other=0.0).to(tl.float32)
    gain_a = tl.load(gain + d, mask=d_in, other=0.0).to(tl.float32)
    gain_b = tl.load(gain + HALF + d, mask=d_in, other=0.0).to(tl.float32)
    if TURNED:
        angle = (at % positions) * HALF + d
        turn_cos = tl.load(cos + angle, mask=d_in, other=0.0)
        turn_sin = tl.load(sin + angle, mask=d_in, other=0.0)
    factor = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * HALF) + eps)[:, None]
    a *= factor * gain_a
    b *= factor * gain_b
    if TURNED:
        turned = a * turn_cos - b * turn_sin
        b = b * turn_cos + a * turn_sin
        a = turned
    tl.store(start, a.to(heads.dtype.element_ty), mask=inside)
    tl.store(start + HALF, b.to(heads.dtype.element_ty), mask=inside)


@triton.jit
def _scale_kernel(matrix, factors, out, size, BLOCK: tl.constexpr):
    """Each program: BLOCK numbers of one row."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * size + column
    values = tl.load(matrix + at, mask=column < size, other=0.0).to(tl.float32)
    factor = tl.load(factors + row).to(tl.float32)
    tl.store(out + at, (values * factor).to(out.dtype.element_ty), mask=column < size)
