"""What a model is built from, and a machine without what its layers need."""

import importlib.util

import pytest
import torch

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.model.presets import PRESETS


def test_a_gpu_without_transformer_engine_is_one_sentence():
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    config = RunConfig()
    with pytest.raises(ValueError, match="Transformer Engine cannot be imported .* install the gpu extra"):
        build_model(config, PRESETS["tiny"], derive_video_layout(config), torch.device("cuda"))
