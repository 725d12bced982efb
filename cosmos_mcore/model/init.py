"""Initial weights as a pure function of (seed, name): equal in every parallel layout (spec/model.md section 6)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cosmos_mcore.model.presets import ModelArch

_STD = 0.02
# Projections whose standard deviation falls with depth, as in the original: w3 is among them, w1 is not.
_DEPTH_SCALED = ("attention.wo.weight", "feed_forward.w2.weight", "feed_forward.w3.weight")


def initial_tensor(name: str, shape: tuple[int, ...], arch: ModelArch, seed: int, device: torch.device) -> Tensor:
    """Draws the start value of one tensor of the original's layout.

    Args:
        name: the original's name, without the ``model.`` prefix.
        shape: its full shape.
        arch: gives the width that scales the output layer.
        seed: of the run.
        device: where to draw; CPUs and GPUs draw different numbers.

    Returns:
        float32 tensor of ``shape``.
    """
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") % 2**63)
    tensor = torch.randn(shape, generator=generator, device=device)
    if name == "tok_embeddings.weight":
        return tensor
    if name == "output.weight":
        # Drawn again as a whole would be a true truncation; at three sigma clamping differs by 0.3 % of the values.
        return tensor.clamp_(-3, 3).mul_(arch.hidden_size**-0.5)
    std = _STD
    if name.endswith(_DEPTH_SCALED):
        std /= (2 * (int(name.split(".")[1]) + 1)) ** 0.5
    return tensor.mul_(std)
