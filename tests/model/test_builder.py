"""What a model is built from, and a machine without what its layers need."""

import importlib.util

import pytest
import torch

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import build_model, transformer_config
from cosmos_mcore.model.presets import PRESETS


def test_a_gpu_without_transformer_engine_is_one_sentence():
    if importlib.util.find_spec("transformer_engine"):
        pytest.skip("Transformer Engine is installed")
    config = RunConfig()
    with pytest.raises(ValueError, match="Transformer Engine cannot be imported .* install the gpu extra"):
        build_model(config, PRESETS["tiny"], derive_video_layout(config), torch.device("cuda"))


def test_full_recomputation_reaches_every_layer_of_uneven_stages():
    config = RunConfig()
    config.parallel.pipeline_model_parallel_size, config.parallel.num_layers_in_first_pipeline_stage = 2, 1
    config.parallel.recompute_granularity = "full"
    found = transformer_config(PRESETS["tiny"], config.parallel, config.precision, transformer_engine=False)
    assert found.recompute_num_layers >= 3  # of the second stage
