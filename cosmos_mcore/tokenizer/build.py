"""Builds the tokenizer that the config names."""

from __future__ import annotations

import torch

from cosmos_mcore.config.derived import pixel_chunk_duration, user_path
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.tokenizer.base import VideoTokenizer
from cosmos_mcore.tokenizer.dv8x16x16 import JitTokenizer, ReleasedTokenizer
from cosmos_mcore.tokenizer.haar import HaarTokenizer


def build_tokenizer(config: RunConfig, device: torch.device) -> VideoTokenizer:
    """Builds the tokenizer of a run.

    Args:
        config: read are ``tokenizer`` and, for the chunk length, ``data.num_frames``.
        device: where a tokenizer with weights keeps them.

    Raises:
        ValueError: if the name is unknown, or the tokenizer's files are missing or damaged.
    """
    name = config.tokenizer.name
    if name == "haar":
        return HaarTokenizer(pixel_chunk_duration(config))
    if name == "dv8x16x16":
        assert config.tokenizer.path is not None  # validate() has seen to it
        kind = JitTokenizer if config.tokenizer.engine == "jit" else ReleasedTokenizer
        return kind(user_path(config.tokenizer.path), pixel_chunk_duration(config), device)
    raise ValueError(f"tokenizer.name={name} is unknown; known are haar and dv8x16x16")
