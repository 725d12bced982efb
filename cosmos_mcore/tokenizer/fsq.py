"""Finite scalar quantisation: 6 real numbers per latent cell become one id in 0..63999 (spec/tokenizer.md section 3).

Everything is computed in float32 whatever the input or the default dtype: in bfloat16 a few percent of the ids change.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

LEVELS = (8, 8, 8, 5, 5, 5)
BASIS = tuple(math.prod(LEVELS[:channel]) for channel in range(len(LEVELS)))
VOCAB_SIZE = math.prod(LEVELS)
_EPS = 1.0e-3


def quantize(z: Tensor) -> Tensor:
    """Rounds the encoder's output to ids.

    Args:
        z: [B, 6, ...], any floating dtype.

    Returns:
        Ids [B, ...], int32.
    """
    z = z.float()
    levels = _per_channel(LEVELS, z, dim=1).to(torch.float32)
    half = (levels - 1) * (1 + _EPS) / 2
    offset = 0.5 * (levels % 2 == 0).to(torch.float32)  # even counts have no symmetric set of digits around zero
    shift = torch.atanh(offset / half)
    centred = torch.round(torch.tanh(z + shift) * half - offset)
    return digits_to_ids(centred.to(torch.int32) + _per_channel(LEVELS, z, dim=1) // 2)


def ids_to_codes(ids: Tensor, dim: int = 1) -> Tensor:
    """The quantised numbers, multiples of 1/4 or 1/2 in [-1, 1], that ids stand for.

    Args:
        ids: [B, ...], any integer dtype, values 0..63999.
        dim: axis of the 6 channels in the result.

    Returns:
        Codes [B, 6, ...] (for ``dim=1``), float32, exact.
    """
    digits = ids_to_digits(ids, dim)
    half = _per_channel(LEVELS, digits, dim) // 2
    return (digits - half).to(torch.float32) / half


def digits_to_ids(digits: Tensor) -> Tensor:
    """Packs digits [B, 6, ...] (channel c in 0..LEVELS[c]-1) into ids [B, ...] int32; channel 0 least significant."""
    return (digits.to(torch.int32) * _per_channel(BASIS, digits, dim=1)).sum(dim=1, dtype=torch.int32)


def ids_to_digits(ids: Tensor, dim: int = 1) -> Tensor:
    """Unpacks ids [B, ...] into digits [B, 6, ...] (for ``dim=1``), int32."""
    ids = ids.to(torch.int32).unsqueeze(dim)
    return ids // _per_channel(BASIS, ids, dim) % _per_channel(LEVELS, ids, dim)


def _per_channel(values: tuple[int, ...], like: Tensor, dim: int) -> Tensor:
    """The per-channel constants, int32, shaped to broadcast against axis ``dim`` of ``like``."""
    shape = [1] * like.ndim
    shape[dim] = len(values)
    return _on_device(values, like.device).view(shape)


@functools.cache
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Copied once: a copy from the host would wait for the GPU, and must not be part of a CUDA graph."""
    return torch.tensor(values, dtype=torch.int32, device=device)
