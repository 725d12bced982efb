"""Triton kernels of the decode step; ``triton_ops`` calls them and says what they compute.

One token per sequence is too little work for matrix libraries: time goes into reading weights and cache once, and into
the number of kernels. So what surrounds a product (norm, SwiGLU, residual) is computed inside its kernel, and all
bounds that change from token to token are read from memory on the device, so one CUDA graph serves every position.
"""

# Triton compiles these functions from their source: types are those of Triton, and annotations mean compile-time.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# FP8 turns into float16 in one instruction, into bfloat16 in several. So that inputs fit into float16, whose largest
# number is 65504, they are made smaller before, and the result larger.
FP8_SHRINK = tl.constexpr(2.0**-6)

WAYS = tl.constexpr(32)  # parts that the search for a threshold divides its bounds into


@triton.jit
def _begin(OVERLAP: tl.constexpr):
    """Programmatic dependent launch: lets the next kernel start up while this one runs, and waits for the one before.

    Nothing that another kernel of the step writes may be touched before.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _launch_next_if(now):
    """Lets the next kernel start up. A predicate, not a branch: branches would end the pipeline of a loop's loads."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; @p griddepcontrol.launch_dependents; mov.u32 $0, 0; }",
        "=r,r",
        [now.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _fetch(address, inside, BYTES: tl.constexpr):
    """Asks for BYTES, a multiple of 16, from each address to come into the L2 cache, and waits for nothing."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [address.to(tl.int64), inside.to(tl.int32), tl.full(address.shape, BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def linear_kernel(
    x,
    weight,
    scale,
    norm,
    residual,
    out,
    rows,
    n_size,
    k_size,
    eps,
    ahead,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    HALF: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    FETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: BLOCK_N channels of all rows. The norm's scale is the same for a whole row, so it comes last.

    With ``ahead`` inputs left to do, the next kernel may start up; until this one is done, it has FETCH bytes per thread
    of its weight brought into the L2 cache, so that memory is read while kernels change.

    BLOCK_K inputs at a time are cut into SPLIT parts, which different warps take: a product of few rows has else too
    little for more than two warps, and two cannot issue loads and conversions as fast as memory delivers.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    inner = tl.arange(0, SPLIT)[:, None] * (BLOCK_K // SPLIT) + tl.arange(0, BLOCK_K // SPLIT)[None, :]
    n_in = n < n_size
    m_in = m < rows
    row = n.to(tl.int64)[None, :, None] * k_size
    parts = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    up_parts = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    if OVERLAP:
        if FETCH:
            columns: tl.constexpr = 32 * SPLIT // BLOCK_N
            thread = tl.arange(0, 32 * SPLIT)
            n_of = tl.program_id(0) * BLOCK_N + thread // columns
            begin = weight + n_of.to(tl.int64) * k_size
            begin += thread % columns * (FETCH // (weight.dtype.element_ty.primitive_bitwidth // 8))
            _fetch(begin, n_of < n_size, FETCH)
            if GATED:
                _fetch(begin + n_size.to(tl.int64) * k_size, n_of < n_size, FETCH)
        tl.extra.cuda.gdc_wait()
    squares = tl.zeros((SPLIT, BLOCK_M), tl.float32)
    for start in range(0, k_size, BLOCK_K):
        if OVERLAP:
            _launch_next_if(start + ahead >= k_size)
        k = start + inner
        k_in = k < k_size
        part = tl.load(
            x + m[None, None, :] * k_size + k[:, :, None], mask=k_in[:, :, None] & m_in[None, None, :], other=0.0
        )
        if NORM:
            wide = part.to(tl.float32)
            squares += tl.sum(wide * wide, axis=1)
            gain = tl.load(norm + k, mask=k_in, other=0.0).to(tl.float32)
            part = (wide * gain[:, :, None]).to(part.dtype)
        if HALF:
            part = (part.to(tl.float32) * FP8_SHRINK).to(tl.float16)
        inside = n_in[None, :, None] & k_in[:, None, :]
        block = tl.load(weight + row + k[:, None, :], mask=inside, other=0.0).to(part.dtype)
        parts = tl.dot(block, part, parts, input_precision="ieee")
        if GATED:
            lower = weight + n_size.to(tl.int64) * k_size
            block = tl.load(lower + row + k[:, None, :], mask=inside, other=0.0).to(part.dtype)
            up_parts = tl.dot(block, part, up_parts, input_precision="ieee")
    acc = tl.sum(parts, axis=0)
    up = tl.sum(up_parts, axis=0)
    if HALF:
        acc /= FP8_SHRINK
        up /= FP8_SHRINK
    if SCALED:
        acc *= tl.load(scale + n, mask=n_in, other=0.0)[:, None]
        if GATED:
            up *= tl.load(scale + n_size + n, mask=n_in, other=0.0)[:, None]
    if NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / k_size + eps)[None, :]
        acc *= factor
        up *= factor
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    at = m[None, :] * n_size + n[:, None]
    inside = n_in[:, None] & m_in[None, :]
    if RESIDUAL:
        acc += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turned(source, offset, d, inside, gains, turn_cos, turn_sin, eps, SIZE: tl.constexpr):
    """Heads [n, D] at ``source + offset``, normed and turned: channel d with channel d + D / 2."""
    half: tl.constexpr = SIZE // 2
    other = tl.where(d < half, d + half, d - half)
    one = tl.load(source + offset + d[None, :], mask=inside, other=0.0).to(tl.float32)
    two = tl.load(source + offset + other[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(one * one, axis=1) / SIZE + eps)[:, None]
    one *= factor * tl.load(gains + d, mask=d < SIZE, other=0.0).to(tl.float32)[None, :]
    two *= factor * tl.load(gains + other, mask=d < SIZE, other=0.0).to(tl.float32)[None, :]
    return one * turn_cos[None, :] + tl.where(d < half, -two, two) * turn_sin[None, :]


@triton.jit
def attend_kernel(
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
    scale,
    eps,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
    FETCH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: the queries of one group of one row against one part of the filled cache.

    The first part's program also takes the new token's key and value, and puts them into the cache. Position and cache
    are those that the step before left, so they are touched before the kernel before is done: FETCH bytes per thread of
    keys and of values come into the L2 cache meanwhile. AHEAD positions before its end the next kernel may start up.
    """
    group = tl.program_id(0)
    split = tl.program_id(1)
    at = tl.load(position).to(tl.int32)
    base = group.to(tl.int64) * capacity * SIZE
    share = tl.cdiv(tl.cdiv(at, SPLITS), BLOCK_S) * BLOCK_S
    first = split * share
    last = tl.minimum(first + share, at)
    h = tl.arange(0, BLOCK_Q)
    d = tl.arange(0, BLOCK_D)
    h_in = h < QUERIES
    d_in = d < SIZE
    kind = keys.dtype.element_ty
    angle = at * (SIZE // 2) + d % (SIZE // 2)
    turn_cos = tl.load(cos + angle, mask=d_in, other=0.0)
    turn_sin = tl.load(sin + angle, mask=d_in, other=0.0)
    if OVERLAP:
        if FETCH:
            length: tl.constexpr = FETCH // (kind.primitive_bitwidth // 8)
            begin = first * SIZE + tl.arange(0, 128) * length
            inside = begin + length <= last * SIZE
            _fetch(keys + base + begin, inside, FETCH)
            _fetch(values + base + begin, inside, FETCH)
        tl.extra.cuda.gdc_wait()
    source = qkv + group * (QUERIES + 2) * SIZE
    inside = h_in[:, None] & d_in[None, :]
    q = _turned(source, h[:, None] * SIZE, d, inside, q_norm, turn_cos, turn_sin, eps, SIZE).to(kind)
    one = tl.arange(0, 1)
    k = _turned(source, (QUERIES + one)[:, None] * SIZE, d, d_in[None, :], k_norm, turn_cos, turn_sin, eps, SIZE)
    k = tl.sum(k, axis=0).to(kind)
    v = tl.load(source + (QUERIES + 1) * SIZE + d, mask=d_in, other=0.0)
    is_first = split == 0
    tl.store(keys + base + at * SIZE + d, k, mask=d_in & is_first)
    tl.store(values + base + at * SIZE + d, v, mask=d_in & is_first)
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], axis=1) * scale
    top = tl.where(is_first, score, float("-inf"))
    total = tl.where(is_first, 1.0, 0.0) + tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.where(is_first, v.to(tl.float32), 0.0)[None, :] + tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for start in range(first, last, BLOCK_S):
        if OVERLAP:
            _launch_next_if(start + AHEAD >= last)
        s = start + tl.arange(0, BLOCK_S)
        s_in = s < last
        cached = tl.load(keys + base + s[None, :] * SIZE + d[:, None], mask=s_in[None, :] & d_in[:, None], other=0.0)
        scores = tl.dot(q, cached, input_precision="ieee") * scale
        scores = tl.where(s_in[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        cached = tl.load(values + base + s[:, None] * SIZE + d[None, :], mask=s_in[:, None] & d_in[None, :], other=0.0)
        acc = tl.dot(weights.to(kind), cached, acc * shrink[:, None], input_precision="ieee")
        top = higher
    heads = (group * QUERIES + h) * SPLITS + split
    tl.store(maxima + heads, top, mask=h_in)
    tl.store(sums + heads, total, mask=h_in)
    tl.store(partial + heads[:, None] * SIZE + d[None, :], acc, mask=inside)


@triton.jit
def combine_kernel(
    partial,
    maxima,
    sums,
    out,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: one head of one row. Parts of the cache that are still empty have a sum of 0."""
    _begin(OVERLAP)
    head = tl.program_id(0)
    at = head * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    d_in = d < SIZE
    top = tl.load(maxima + at)
    weights = tl.exp2(top - tl.max(top, axis=0))
    acc = tl.load(partial + at[:, None] * SIZE + d[None, :], mask=d_in[None, :], other=0.0)
    whole = tl.sum(acc * weights[:, None], axis=0) / tl.sum(tl.load(sums + at) * weights, axis=0)
    tl.store(out + head * SIZE + d, whole.to(out.dtype.element_ty), mask=d_in)


@triton.jit
def largest_kernel(logits, largest, v_size, chunks, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """Each program: the largest logit of one chunk of a row. ``largest``: [B, chunks] float32."""
    _begin(OVERLAP)
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
    _begin(OVERLAP)
    chunk, row = tl.program_id(0), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK_C)
    highest = tl.max(tl.load(largest + row * chunks + c, mask=c < chunks, other=float("-inf")), axis=0)
    logit = tl.load(logits + row * v_size + v, mask=v < v_size, other=float("-inf"))
    if GREEDY:
        share = tl.where(logit == highest, 1.0, 0.0)
    else:
        share = tl.exp((logit - highest) * inverse_temperature)
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
    _begin(OVERLAP)
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
    _begin(OVERLAP)
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
    _begin(OVERLAP)
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
    _begin(OVERLAP)
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    winner = tl.load(winners + row * chunks + c, mask=c < chunks, other=-2.0)
    token = tl.load(tokens + row * chunks + c, mask=c < chunks, other=0)
    reached = winner == tl.max(winner, axis=0)
    tl.store(out + row, tl.min(tl.where(reached, token, 0x7FFFFFFF), axis=0).to(tl.int64))
