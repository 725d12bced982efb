"""What a model is built from, and a machine without what its layers need."""

import importlib.util

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import build_model, check_fp8, transformer_config
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.parallel.layout import stage_layers


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


@pytest.mark.parametrize(
    ("pp", "vpp", "first", "last"),
    [
        (1, None, None, None),
        (2, 2, None, None),
        (3, None, None, None),
        (4, None, 1, None),
        (6, None, None, 1),
        (3, 2, 4, 4),
    ],
)
def test_stages_are_those_that_megatron_builds(pp, vpp, first, last):
    config = RunConfig()
    parallel, arch = config.parallel, PRESETS["4b"]
    parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size = pp, vpp
    parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage = first, last
    megatron = transformer_config(arch, parallel, config.precision, transformer_engine=False)
    built = [
        [get_num_layers_to_build(megatron, vp_stage=chunk, pp_rank=rank) for chunk in (range(vpp) if vpp else [None])]
        for rank in range(pp)
    ]
    assert stage_layers(parallel, arch.num_layers) == built


def test_the_host_waits_at_no_border_of_pipeline_stages():
    """Megatron's default synchronizes the device after each batched transfer, for a PyTorch of 2022."""
    config = RunConfig()
    config.parallel.pipeline_model_parallel_size = 2
    found = transformer_config(PRESETS["tiny"], config.parallel, config.precision, transformer_engine=False)
    assert found.batch_p2p_comm and not found.batch_p2p_sync


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "why"),
    [
        ("delayed", (8, 9), "12.8", None),
        ("tensorwise", (8, 0), "13.0", "capability 8.0; choose another recipe"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (9, 0), "12.8", "needs CUDA 12.9, and torch has 12.8"),
        ("mxfp8", (10, 0), "13.0", None),
        ("mxfp8", (9, 0), "13.0", "capability 9.0"),
        ("mxfp8", (12, 0), "13.0", "capability 12.0"),  # a consumer's Blackwell
    ],
)
def test_a_gpu_must_have_the_recipe(monkeypatch, recipe, capability, cuda, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    if why is None:
        check_fp8(recipe, torch.device("cuda", 0))
        return
    with pytest.raises(ValueError, match=why):
        check_fp8(recipe, torch.device("cuda", 0))
