"""The parts of the network in plain PyTorch: all of generation on CPUs, the pass over the prompt on GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mcore.inference.sampling import SamplingOptions, sample_tokens
from cosmos_mcore.inference.weights import Matrix

MAX_ROWS = None  # any batch


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
    """``residual + activation(weight @ rms_norm(x))``, each part where it is given.

    Args:
        x: [rows, K].
        weight: [N, K], or [2N, K] if ``gated``.
        norm: [K], gain of an RMS norm of ``x``.
        eps: of the norm.
        gated: SwiGLU: the upper half of the result, through SiLU, times the lower half.
        residual: [rows, N], added to the result.
        dtype: of the result; None: that of ``x``.

    Returns:
        [rows, N].
    """
    if norm is not None:
        x = F.rms_norm(x, (x.size(-1),), norm, eps)
    out = F.linear(x, weight.dense(x.dtype))
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = F.silu(gate) * up
    if residual is not None:
        out = out + residual
    return out if dtype is None else out.to(dtype)


def rotated_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor, k_norm: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Takes the query-key-value product apart, norms queries and keys and turns them by their position's angles.

    Args:
        qkv: [rows, groups * (queries per group + 2) * D], interleaved by query group.
        cos: [rows or 1, D / 2] float32, of the angles.
        sin: as ``cos``.
        q_norm: [D], gain of the queries' RMS norm.
        k_norm: [D], gain of the keys'.
        groups: query groups on this rank.
        eps: of the norms.

    Returns:
        Queries [rows, heads, D], keys and values [rows, groups, D].
    """
    size = q_norm.numel()
    grouped = qkv.view(len(qkv), groups, -1, size)
    query = _turn(F.rms_norm(grouped[:, :, :-2], (size,), q_norm, eps), cos, sin)
    key = _turn(F.rms_norm(grouped[:, :, -2:-1], (size,), k_norm, eps), cos, sin)
    return query.flatten(1, 2), key.squeeze(2), grouped[:, :, -1]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns channel k with channel k + D / 2; in float32, as the angles are."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
    """Attention of one new token per row to itself and all before it; its turned key and its value enter the cache.

    Args:
        qkv: [B, groups * (queries per group + 2) * D], as in ``rotated_heads``.
        keys: [B, groups, capacity, D], this layer's cache; position ``position`` is written, those behind not read.
        values: as ``keys``.
        position: [1] int64, of the new token.
        cos: [capacity or more, D / 2] float32, of the angles of all positions.
        sin: as ``cos``.
        q_norm: [D], gain of the queries' RMS norm.
        k_norm: [D], gain of the keys'.
        eps: of the norms.

    Returns:
        [B, heads * D].
    """
    at = int(position)
    row = slice(at, at + 1)
    query, key, value = rotated_heads(qkv, cos[row], sin[row], q_norm, k_norm, keys.size(1), eps)
    keys[:, :, at], values[:, :, at] = key, value
    filled = keys[:, :, : at + 1], values[:, :, : at + 1]
    out = F.scaled_dot_product_attention(query[:, :, None], *filled, enable_gqa=query.size(1) != keys.size(1))
    return out.flatten(1)


def sample(logits: Tensor, options: SamplingOptions, seeds: Tensor, position: Tensor) -> Tensor:
    """Draws the id that follows position ``position`` in each row.

    Args:
        logits: [B, V] float32.
        options: how.
        seeds: [B] int64: a row's draws depend on its seed and the position alone.
        position: [1] int64.

    Returns:
        Token ids [B] int64.
    """
    return sample_tokens(logits, options, seeds, int(position))
