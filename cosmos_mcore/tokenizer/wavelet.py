"""Haar wavelets as a 4x4x4 patching of videos (spec/tokenizer.md section 2), always in float32.

Each level splits every axis into sums and differences of neighbouring pairs: 8 sub-bands, in the order LLL, LLH, LHL,
LHH, HLL, HLH, HHL, HHH of (time, height, width), of half the size. LLL is the mean of 8 pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 2
PATCH = 2**_LEVELS


def patch(video: Tensor) -> Tensor:
    """[B, C, 1 + 4k, H, W], any dtype, to float32 [B, 64 C, 1 + k, H/4, W/4]; the first frame counts four times."""
    first = video[:, :, :1].expand(-1, -1, PATCH - 1, -1, -1)
    video = torch.cat([first, video], dim=2).to(torch.float32)
    for _ in range(_LEVELS):
        for axis in (2, 3, 4):
            video = _split(video, axis)
        video = _merge_bands(video)
    return video


def unpatch(bands: Tensor) -> Tensor:
    """The inverse of ``patch``: [B, 64 C, 1 + k, h, w] to float32 [B, C, 1 + 4k, 4h, 4w]."""
    bands = bands.to(torch.float32)
    for _ in range(_LEVELS):
        bands = _split_bands(bands)
        for axis in (4, 3, 2):
            bands = _join(bands, axis)
    return bands[:, :, PATCH - 1 :]


def _split(video: Tensor, axis: int) -> Tensor:
    """Means and half differences of pairs along ``axis`` of the last 5; a new leading axis holds the two.

    The original's factors 1/sqrt(2) for an axis and 1/(2 sqrt(2)) for a level multiply to 1/8: 1/2 for each axis.
    """
    axis -= 5
    even, odd = video.unflatten(axis, (-1, 2)).unbind(axis)
    return torch.stack([even + odd, even - odd]).mul_(0.5)


def _join(bands: Tensor, axis: int) -> Tensor:
    """The inverse of ``_split``: takes the leading axis away."""
    axis -= 5
    low, high = bands.unbind(0)
    return torch.stack([low + high, low - high], dim=axis).flatten(axis - 1, axis)


def _merge_bands(bands: Tensor) -> Tensor:
    """[width, height, time, B, C, T, H, W] to [B, 8 C, T, H, W], time most significant."""
    return bands.permute(3, 2, 1, 0, 4, 5, 6, 7).flatten(1, 4)


def _split_bands(video: Tensor) -> Tensor:
    """The inverse of ``_merge_bands``."""
    return video.unflatten(1, (2, 2, 2, -1)).permute(3, 2, 1, 0, 4, 5, 6, 7)
