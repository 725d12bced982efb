"""From noise to a latent video: Euler steps along EDM's noise levels (Karras et al. 2022, spec/inference.md section 6).

The arithmetic is that of diffusers' ``EDMEulerScheduler``. It is a few lines without any state, and the latent can stay
float32 throughout, so that package is not worth a dependency.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIGMA_DATA = 0.5  # standard deviation of the network's latents
GUIDANCE = 1.8
_NUM_STEPS = 15
_SIGMA_MAX, _SIGMA_MIN, _RHO = 80.0, 0.02, 7.0
_DRAWS_BEFORE = 14
_SPREAD = 0x9E3779B1  # odd: each clip's seed is another one


def noise_levels() -> list[float]:
    """Standard deviations of the noise before each step, falling, and 0 after the last one."""
    first, last = _SIGMA_MAX ** (1 / _RHO), _SIGMA_MIN ** (1 / _RHO)
    return [(first + step / (_NUM_STEPS - 1) * (last - first)) ** _RHO for step in range(_NUM_STEPS)] + [0.0]


def c_noise(sigma: float) -> float:
    """How the network is told a noise level."""
    return 0.25 * math.log(sigma)


def noise_generator(seed: int) -> torch.Generator:
    """A CPU generator whose next normal numbers are the original's noise for this seed."""
    # The generator looks at 32 bits, of which a seed has more in the later clips of a chain.
    generator = torch.Generator().manual_seed((seed ^ (seed >> 32) * _SPREAD) % 2**32)
    # The original's conditioner draws before: whether to drop conditions, with the outcome always the same.
    torch.rand(1, generator=generator)
    for _ in range(_DRAWS_BEFORE):
        torch.bernoulli(torch.zeros(1), generator=generator)
    return generator


def sample(predict: Callable[[Tensor, float], Tensor], noise: Tensor, levels: Sequence[float]) -> Tensor:
    """Takes the noise out step by step.

    Args:
        predict: the network: scaled latent [1, ...] and ``c_noise`` to predictions [2, ...], first with ids and text,
            then without.
        noise: [1, ...] standard normal.
        levels: falling noise levels, the first one that of the start, usually ``noise_levels()``.

    Returns:
        The latent at the last level, float32, on the device and of the shape of ``noise``.
    """
    latent = noise.float() * math.sqrt(levels[0] ** 2 + 1)
    for sigma, following in zip(levels, levels[1:], strict=False):
        total = sigma**2 + SIGMA_DATA**2
        told, untold = predict(latent / math.sqrt(total), c_noise(sigma)).float().split(1)
        guided = told + GUIDANCE * (told - untold)
        clean = latent * (SIGMA_DATA**2 / total) + guided * (SIGMA_DATA * sigma / math.sqrt(total))
        latent = latent + (latent - clean) * ((following - sigma) / sigma)
    return latent
