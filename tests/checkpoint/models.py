"""Small models with the structure of the released ones, as checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.model.presets import PRESETS, ModelArch

RELEASED = [name for name in PRESETS if name != "tiny"]


def reduced(preset: str) -> ModelArch:
    """The preset with few and narrow layers; what tells the presets apart stays."""
    arch = PRESETS[preset]
    heads = arch.num_attention_heads
    # Head size times heads is the width or, as in the 12B and 13B, not.
    wide = arch.hidden_size != heads * arch.kv_channels
    return replace(
        arch,
        num_layers=4,
        hidden_size=320 if wide else heads * 8,
        ffn_hidden_size=96,
        kv_channels=8,
        vocab_size=512,
        embedding_size=576 if arch.text_to_video else 512,
        context_size=24 if arch.text_to_video else None,
    )


def random_weights(arch: ModelArch, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights under the original's names; norms around 1, so that the model computes something."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in original_shapes(arch).items():
        values = torch.randn(shape, generator=generator)
        weights[name] = (1 + values / 10 if len(shape) == 1 else values / shape[-1] ** 0.5).to(dtype)
    return weights


def save_model(path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Writes ``model.pt`` with ``torch.save``, as released."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model." + name: tensor for name, tensor in weights.items()}, path)
    return path
