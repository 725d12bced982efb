"""Triton kernels that draw a token: a row of logits in chunks, one program each; ``triton_ops`` calls them.

A search for a threshold goes through all shares several times, and one program would have one SM's share of the
bandwidth of caches. Kernels of many programs each are faster, and need no barrier between programs.
"""

# Triton compiles these functions from their source: types are those of Triton, and annotations mean compile-time.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from cosmos_mcore.inference.triton_kernels import begin

WAYS = tl.constexpr(32)  # parts that the search for a threshold divides its bounds into


@triton.jit
def largest_kernel(logits, largest, v_size, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Each program: the largest logit of one chunk of a row. ``largest``: [B, chunks] float32."""
    begin(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(logits + row * v_size + v, mask=v < v_size, other=float("-inf"))
    tl.store(largest + row * chunks + chunk, tl.max(logit, axis=0))


@triton.jit
def shares_kernel(
    logits,
    largest,
    shares,
    sums,
    bounds,
    v_size,
    chunks,
    inverse_temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: one chunk's probabilities relative to the largest, [B, V] float32, and their sum.

    ``bounds`` [B, 2] int32 get the bits between which a threshold can lie.
    """
    begin(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    highest = tl.max(tl.load(largest + row * chunks + c, mask=c < chunks, other=float("-inf")), axis=0)
    logit = tl.load(logits + row * v_size + v, mask=v < v_size, other=float("-inf"))
    share = tl.where(logit == highest, 1.0, 0.0) if GREEDY else tl.exp((logit - highest) * inverse_temperature)
    tl.store(shares + row * v_size + v, share, mask=v < v_size)
    tl.store(sums + row * chunks + chunk, tl.sum(share, axis=0))
    tl.store(bounds + row * 2, -1)
    tl.store(bounds + row * 2 + 1, 0x3F800000)


@triton.jit
def _bounds(
    bounds, weights, sums, row, chunks, limit, COUNT: tl.constexpr, NARROW: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The bits between which the threshold lies, by the chunks' ``weights`` above WAYS numbers between ``bounds``."""
    low = tl.load(bounds + row * 2)
    high = tl.load(bounds + row * 2 + 1)
    if NARROW:
        c = tl.arange(0, BLOCK_C)
        if not COUNT:
            limit *= tl.sum(tl.load(sums + row * chunks + c, mask=c < chunks, other=0.0), axis=0)
        at = (row * chunks + c[:, None]) * WAYS + tl.arange(0, WAYS)[None, :]
        above = tl.sum(tl.load(weights + at, mask=c[:, None] < chunks, other=0.0), axis=0)
        step = tl.cdiv(high - low, WAYS)
        low += tl.sum((above > limit).to(tl.int32), axis=0) * step
        high = tl.minimum(low + step, high)
    return low, high


@triton.jit
def narrow_kernel(
    shares,
    sums,
    bounds,
    weights,
    next_bounds,
    next_weights,
    v_size,
    chunks,
    limit,
    COUNT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: what one chunk has above each of WAYS numbers between the bounds, after narrowing these.

    A share is kept if no more than ``limit`` (of the sum, or, if COUNT, in number) lies above it. Non-negative floats
    are in the order of their bits, so dividing the bits is exact, and 6 times 32 ways tell all 2^30 apart. The sum over
    chunks has one order, so the bounds are the same in every program and every run.
    """
    begin(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1)
    low, high = _bounds(bounds, weights, sums, row, chunks, limit, COUNT, NARROW, BLOCK_C)
    tl.store(next_bounds + row * 2, low)
    tl.store(next_bounds + row * 2 + 1, high)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    share = tl.load(shares + row * v_size + v, mask=v < v_size, other=0.0)
    way = tl.arange(0, WAYS)
    edges = low + (way + 1) * tl.cdiv(high - low, WAYS)
    taken = share.to(tl.int32, bitcast=True)[None, :] > edges[:, None]
    weight = tl.where(taken, 1.0 if COUNT else share[None, :], 0.0)
    tl.store(next_weights + (row * chunks + chunk) * WAYS + way, tl.sum(weight, axis=1))


@triton.jit
def cut_kernel(
    shares,
    sums,
    bounds,
    weights,
    next_sums,
    next_bounds,
    v_size,
    chunks,
    limit,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: one chunk, whose shares below the threshold of a COUNT become 0."""
    begin(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1)
    low, _ = _bounds(bounds, weights, sums, row, chunks, limit, True, True, BLOCK_C)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    share = tl.load(shares + row * v_size + v, mask=v < v_size, other=0.0)
    share = tl.where(share.to(tl.int32, bitcast=True) > low, share, 0.0)
    tl.store(shares + row * v_size + v, share, mask=v < v_size)
    tl.store(next_sums + row * chunks + chunk, tl.sum(share, axis=0))
    tl.store(next_bounds + row * 2, low)
    tl.store(next_bounds + row * 2 + 1, 0x3F800000)


@triton.jit
def draw_kernel(
    shares,
    sums,
    bounds,
    weights,
    winners,
    tokens,
    seeds,
    position,
    v_size,
    chunks,
    limit,
    GREEDY: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: one chunk's best share over noise, and whose it is: [B, chunks] float32 and int32."""
    begin(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1)
    low, _ = _bounds(bounds, weights, sums, row, chunks, limit, False, NARROW, BLOCK_C)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    ratio = tl.load(shares + row * v_size + v, mask=v < v_size, other=0.0)
    if not GREEDY:
        # One Philox stream per seed; no two positions share a number. -log(1 - u), whose small values decide, by its
        # series where the difference would cost digits.
        u = tl.rand(tl.load(seeds + row), tl.load(position).to(tl.int32) * v_size + v)
        noise = tl.where(u < 0.01, u * (1.0 + u * (0.5 + u / 3.0)), -tl.log(1.0 - u))
        kept = (ratio.to(tl.int32, bitcast=True) > low) & (v < v_size)
        ratio = tl.where(kept, ratio / tl.maximum(noise, 1.0e-10), -1.0)
    winner = tl.max(ratio, axis=0)
    tl.store(winners + row * chunks + chunk, winner)
    tl.store(tokens + row * chunks + chunk, tl.min(tl.where(ratio == winner, v, v_size), axis=0))


@triton.jit
def pick_kernel(winners, tokens, out, chunks, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr):
    """Each program: the winner of one row's chunks."""
    begin(OVERLAP)
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    winner = tl.load(winners + row * chunks + c, mask=c < chunks, other=-2.0)
    token = tl.load(tokens + row * chunks + c, mask=c < chunks, other=0)
    reached = winner == tl.max(winner, axis=0)
    tl.store(out + row, tl.min(tl.where(reached, token, 0x7FFFFFFF), axis=0).to(tl.int64))
