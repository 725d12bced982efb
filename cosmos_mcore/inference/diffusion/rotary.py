"""Rotary angles of the diffusion decoder's positions in time, height and width, with the original's rounding."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

FPS = 24.0  # the original always says so; at this rate one latent frame is one step of time
_BASE = 10000.0
_SPATIAL_EXTRAPOLATION = 1.5


def rotary_angles(shape: tuple[int, int, int], head_dim: int, fps: float = FPS) -> Tensor:
    """Angles of every position, t-major.

    The original keeps its tables in bfloat16, so base, exponents, powers, their reciprocals, positions and angles are
    each rounded to it. The network was trained so: unrounded angles change its output by up to 5e-3.

    Args:
        shape: positions (T, h, w).
        head_dim: of one attention head; its pairs go to time, height and width in this order, 22:21:21 of 64.
        fps: frames per second.

    Returns:
        Float32 [T*h*w, head_dim / 2] on the CPU; element d turns the pair (d, d + head_dim / 2).
    """
    spatial = head_dim // 6 * 2
    temporal = head_dim - 2 * spatial
    extrapolated = _BASE * _SPATIAL_EXTRAPOLATION ** (spatial / (spatial - 2))
    steps = [torch.arange(count, dtype=torch.float32) for count in shape]
    steps[0] = _rounded(_rounded(_rounded(steps[0]) / fps) * FPS)
    dims_and_bases = ((temporal, _BASE), (spatial, extrapolated), (spatial, extrapolated))
    axes = [_axis(step, dim, base) for step, (dim, base) in zip(steps, dims_and_bases, strict=True)]
    views = (axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None])
    return torch.cat([view.expand(*shape, -1) for view in views], dim=-1).flatten(0, 2)


@lru_cache(maxsize=2)
def rotary_table(shape: tuple[int, int, int], head_dim: int, fps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``rotary_angles``, each float32 [T*h*w, 1, head_dim / 2], kept for the next call."""
    angles = rotary_angles(shape, head_dim, fps).to(device)[:, None]
    return angles.cos(), angles.sin()


def _axis(positions: Tensor, dim: int, base: float) -> Tensor:
    """[n] to angles [n, dim / 2]."""
    exponents = _rounded(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    powers = _rounded(_rounded(torch.tensor(base)) ** exponents)
    return _rounded(_rounded(positions)[:, None] * _rounded(1 / powers))


def _rounded(values: Tensor) -> Tensor:
    return values.to(torch.bfloat16).to(torch.float32)
