"""3-D rotary angles over (time, height, width), with YaRN for the 12B and 13B (spec/model.md section 3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cosmos_mcore.model.presets import ModelArch, Yarn


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with (time, height, width): two equal sixths in space, the rest in time."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """``1 / base^(2k/dim)`` for k < dim/2, float32 [dim / 2]."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def yarn_frequencies(frequencies: Tensor, yarn: Yarn, length: int) -> Tensor:
    """Blends each frequency between itself and itself / scale, by how often it turns within ``length`` positions."""
    high = 2 * math.pi * yarn.beta_fast / length
    low = 2 * math.pi * yarn.beta_slow / length
    keep = ((frequencies - low) / (high - low)).clamp(0, 1)
    return frequencies * ((1 - keep) / yarn.scale + keep)


def rotary_angles(
    arch: ModelArch, latent_shape: tuple[int, int, int], begin_of_video: bool = False, padded_length: int | None = None
) -> Tensor:
    """Angles of every position of a clip, in the order of its tokens (time outermost, then height, then width).

    Args:
        arch: gives head size, base and YaRN.
        latent_shape: (T, H, W) of the clip.
        begin_of_video: put one row of zero angles in front, for the begin-of-video token.
        padded_length: append rows of zero angles up to this length.

    Returns:
        float32 [S, 1, 1, head_dim]: the half-split layout of Megatron, each angle at channel k and k + head_dim / 2.
        YaRN's magnitude scale is not applied, as in the original.
    """
    dim_t, dim_s, _ = axis_dims(arch.kv_channels)
    temporal = inverse_frequencies(dim_t, arch.rotary_base)
    spatial = inverse_frequencies(dim_s, arch.rotary_base)
    if arch.yarn is not None:
        original_t, original_h, _ = arch.yarn.original_latent_shape
        temporal = yarn_frequencies(temporal, arch.yarn, original_t)
        spatial = yarn_frequencies(spatial, arch.yarn, original_h)  # height and width share one table
    t, h, w = (torch.arange(n, dtype=torch.float32) for n in latent_shape)
    grids = torch.meshgrid(t, h, w, indexing="ij")
    parts = [
        grid.reshape(-1, 1) * frequencies for grid, frequencies in zip(grids, (temporal, spatial, spatial), strict=True)
    ]
    angles = torch.cat(parts, dim=-1)
    rows = padded_length if padded_length is not None else len(angles) + begin_of_video
    table = torch.zeros(rows, arch.kv_channels // 2)
    table[int(begin_of_video) : int(begin_of_video) + len(angles)] = angles
    return torch.cat((table, table), dim=-1)[:, None, None, :]
