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


@pytest.mark.parametrize(("name", "words"), [("dv8x16x16", "not available yet"), ("dv8x8x8", "known are haar")])
def test_others(name, words):
    with pytest.raises(ValueError, match=words):
        build(name)
