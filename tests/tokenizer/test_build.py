"""The tokenizer that a config names."""

import pytest
import torch

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.tokenizer.build import build_tokenizer
from cosmos_mcore.tokenizer.haar import HaarTokenizer


def build(name, **data):
    config = RunConfig()
    config.tokenizer.name = name
    for key, value in data.items():
        setattr(config.data, key, value)
    return build_tokenizer(config, torch.device("cpu"))


def test_haar():
    tokenizer = build("haar", num_frames=17)
    assert isinstance(tokenizer, HaarTokenizer)
    assert (tokenizer.pixel_chunk_duration, tokenizer.latent_chunk_duration) == (17, 3)
    assert build("haar", num_frames=66).pixel_chunk_duration == 33


def test_unknown():
    with pytest.raises(ValueError, match="known are haar"):
        build("dv8x8x8")
