"""Builds the tokenizer that the config names."""

from __future__ import annotations

import torch

from cosmos_mcore.config.derived import pixel_chunk_duration
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.tokenizer.base import VideoTokenizer
from cosmos_mcore.tokenizer.haar import HaarTokenizer


def build_tokenizer(config: RunConfig, device: torch.device) -> VideoTokenizer:
    """Builds the tokenizer of a run.

    Args:
        config: read are ``tokenizer`` and, for the chunk length, ``data.num_frames``.
        device: where a tokenizer with weights keeps them.

    Raises:
        ValueError: if the name is unknown or its tokenizer not available.
    """
    name = config.tokenizer.name
    if name == "haar":
        return HaarTokenizer(pixel_chunk_duration(config))
    if name == "dv8x16x16":
        raise ValueError("tokenizer.name=dv8x16x16 is not available yet in this version; use tokenizer.name=haar")
    raise ValueError(f"tokenizer.name={name} is unknown; known are haar and dv8x16x16")
