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


@triton.jit
def begin(OVERLAP: tl.constexpr):
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
def _fetch(address, inside, size):
    """Asks for ``size`` bytes, a multiple of 16, from each address to come into the L2 cache, and waits for nothing."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [address.to(tl.int64), inside.to(tl.int32), tl.zeros(address.shape, tl.int32) + size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["ahead", "fetch"])
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
    fetch,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    SCALED: tl.constexpr,
    HALF: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: BLOCK_N channels of all rows. The norm's scale is the same for a whole row, so it comes last.

    With ``ahead`` inputs left to do, the next kernel may start up; until this one is done, it has ``fetch`` bytes
    per thread of its weight brought into the L2 cache, so that memory is read while kernels change.

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
        columns: tl.constexpr = 32 * SPLIT // BLOCK_N
        thread = tl.arange(0, 32 * SPLIT)
        n_of = tl.program_id(0) * BLOCK_N + thread // columns
        fetched = (n_of < n_size) & (fetch > 0)
        first = weight + n_of.to(tl.int64) * k_size
        first += thread % columns * (fetch // (weight.dtype.element_ty.primitive_bitwidth // 8))
        _fetch(first, fetched, fetch)
        if GATED:
            _fetch(first + n_size.to(tl.int64) * k_size, fetched, fetch)
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


@triton.jit(do_not_specialize=["ahead", "fetch"])
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
    ahead,
    fetch,
    QUERIES: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Each program: the queries of one group of one row against one part of the filled cache.

    The first part's program also takes the new token's key and value, and puts them into the cache. Position and cache
    are those that the step before left, so they are touched before the kernel before is done: ``fetch`` bytes per
    thread of keys and of values come into the L2 cache meanwhile. With ``ahead`` positions left to do, the next kernel
    may start up.
    """
    group = tl.program_id(0)
    split = tl.program_id(1)
    at = tl.load(position).to(tl.int32)
    base = group.to(tl.int64) * capacity * SIZE
    share = tl.cdiv(tl.cdiv(at, SPLITS), 8) * 8  # not whole blocks: parts would differ by up to a half
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
        length = fetch // (kind.primitive_bitwidth // 8)
        begun = first * SIZE + tl.arange(0, 128) * length
        fetched = (begun + length <= last * SIZE) & (fetch > 0)
        _fetch(keys + base + begun, fetched, fetch)
        _fetch(values + base + begun, fetched, fetch)
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
            _launch_next_if(start + ahead >= last)
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
    begin(OVERLAP)
    head = tl.program_id(0)
    at = head * SPLITS + tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    d_in = d < SIZE
    top = tl.load(maxima + at)
    weights = tl.exp2(top - tl.max(top, axis=0))
    acc = tl.load(partial + at[:, None] * SIZE + d[None, :], mask=d_in[None, :], other=0.0)
    whole = tl.sum(acc * weights[:, None], axis=0) / tl.sum(tl.load(sums + at) * weights, axis=0)
    tl.store(out + head * SIZE + d, whole.to(out.dtype.element_ty), mask=d_in)
