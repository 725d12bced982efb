"""Attention of the diffusion decoder: over all positions, which ranks may share, and over the text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_EPS = 1.0e-6
# cuDNN's kernel is made for Hopper; FlashAttention 2, which torch would choose by itself, is not.
_KERNELS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class HeadNorm(nn.Module):
    """RMS normalisation of each head, in float32; holds the gain [head_dim]."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(head_dim))

    def forward(self, heads: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """[B, S, heads, head_dim], turned by cosines and sines [S, 1, head_dim / 2] if given; on a GPU in place."""
        return _norm_heads(heads, self.weight, rotary)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys and no biases; parameter names are the released ones.

    Attributes:
        group: ranks that each hold a contiguous part of the positions, in order; None: this one has all. Only for
            self-attention.
    """

    def __init__(self, channels: int, context_channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.group: dist.ProcessGroup | None = None
        head_dim = channels // heads
        self.to_q = nn.Sequential(nn.Linear(channels, channels, bias=False), HeadNorm(head_dim))
        self.to_k = nn.Sequential(nn.Linear(context_channels, channels, bias=False), HeadNorm(head_dim))
        self.to_v = nn.Sequential(nn.Linear(context_channels, channels, bias=False))
        self.to_out = nn.Sequential(nn.Linear(channels, channels, bias=False))

    def forward(self, x: Tensor, context: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attends from ``x`` [B, S, channels] to ``context`` [B, M, context_channels], or without one to itself.

        Returns:
            [B, S, channels], what ``to_out`` takes: who calls has a use for that matrix of its own.
        """
        seen = x if context is None else context
        # Keys travel while values are computed, both while queries are.
        k, keys_sent = _start_gather(self._heads(self.to_k, seen, rotary), self.group)
        v, values_sent = _start_gather(self._heads(self.to_v, seen), self.group)
        q = self._heads(self.to_q, x, rotary)
        for work in (*keys_sent, *values_sent):
            work.wait()
        if context is None and _suits_flash_attention(q) and (flash := _flash_attention()):
            return flash(q, k, v)[0].flatten(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        with _kernels(q.is_cuda):
            mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, layers: nn.Sequential, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """[B, S, channels of x] to [B, S, heads, head_dim]."""
        linear, *norm = layers
        heads = linear(x).unflatten(-1, (self.heads, -1))
        return norm[0](heads, rotary) if norm else heads


def _start_gather(part: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, list[Any]]:
    """[B, S, ...] of each rank to [B, ranks * S, ...], complete when the works that are also returned are."""
    if group is None:
        return part, []
    whole = part.new_empty(part.size(0), group.size() * part.size(1), *part.shape[2:])
    pairs = zip(whole, part.contiguous(), strict=True)
    return whole, [dist.all_gather_into_tensor(rows, mine, group=group, async_op=True) for rows, mine in pairs]


def _suits_flash_attention(q: Tensor) -> bool:
    return q.is_cuda and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) >= (9, 0)


@cache
def _flash_attention() -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Any]] | None:
    """FlashAttention 4: a tenth faster than cuDNN's kernel for this many positions; None where it is not installed."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None
    return flash_attn_func


def _kernels(cuda: bool) -> AbstractContextManager[Any]:
    return sdpa_kernel(_KERNELS, set_priority=True) if cuda else nullcontext()


def _norm_heads(heads: Tensor, gain: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    if heads.is_cuda:  # step by step, ten passes over all queries and keys would take longer
        from cosmos_mcore.inference.diffusion import kernels

        return kernels.norm_heads(heads, gain, rotary, _EPS)
    values = heads.float()
    values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + _EPS) * gain.float()
    if rotary is not None:
        cos, sin = rotary
        a, b = values.chunk(2, dim=-1)
        values = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return values.to(heads.dtype)
