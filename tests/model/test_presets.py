"""Sizes of the model family and what the config may change."""

import math
import re

import pytest

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config.schema import ModelConfig, RunConfig
from cosmos_mcore.model.presets import PRESETS, check_run_layout, resolve_arch

# spec/model.md section 1
PARAMETERS = {
    "1b": 1_839_271_936,
    "4b": 4_014_088_192,
    "12b": 11_560_975_360,
    "5b-video2world": 4_584_845_312,
    "13b-video2world": 13_323_125_760,
}
KEYS = {"1b": 179, "4b": 179, "12b": 443, "5b-video2world": 291, "13b-video2world": 723}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_released_sizes(preset):
    shapes = original_shapes(resolve_arch(ModelConfig(preset=preset)))
    assert sum(map(math.prod, shapes.values())) == PARAMETERS[preset]
    assert len(shapes) == KEYS[preset]


def test_only_large_models_have_yarn_and_only_video2world_reads_text():
    assert {name for name, arch in PRESETS.items() if arch.yarn} == {"12b", "13b-video2world"}
    assert {name for name, arch in PRESETS.items() if arch.text_to_video} == {"5b-video2world", "13b-video2world"}


def test_fields_of_the_config_replace_those_of_the_preset():
    arch = resolve_arch(ModelConfig(preset="12b", num_layers=3, kv_channels=64))
    assert (arch.num_layers, arch.kv_channels) == (3, 64)
    assert arch.hidden_size == PRESETS["12b"].hidden_size and arch.yarn == PRESETS["12b"].yarn
    assert PRESETS["12b"].num_layers == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "4B"}, "model.preset=4B is unknown; did you mean 4b?"),
        ({"preset": "video2world"}, "did you mean"),
        ({"num_attention_heads": 6, "num_query_groups": 4}, "num_attention_heads=6 must be a multiple of"),
        ({"kv_channels": 33}, "model.kv_channels=33 must be even"),
        ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError) as caught:
        resolve_arch(ModelConfig(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


FP8 = {"precision.fp8": "tensorwise"}


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        (
            "tiny",
            {**FP8, "model.ffn_hidden_size": 40},
            "multiples of 16, and model.ffn_hidden_size leaves 40 on each of 1",
        ),
        (
            "tiny",
            {**FP8, "model.kv_channels": 10, "model.num_query_groups": 1},
            "num_attention_heads x kv_channels leaves",
        ),
        (
            "1b",
            {"precision.fp8": "mxfp8", "model.hidden_size": 2064},
            "multiples of 32, and model.hidden_size leaves 2064",
        ),
        (
            "4b",
            {**FP8, "precision.fp8_first_last_bf16": [17, 0]},
            "[17, 0]: Megatron leaves at most .* here 16; lower it",
        ),
        (
            "4b",
            {**FP8, "precision.fp8_first_last_bf16": [1, 5], "parallel.pipeline_model_parallel_size": 4},
            "here 4; lower it",
        ),
    ],
)
def test_sizes_that_fp8_cannot_do_are_one_sentence(preset, changes, message):
    config = RunConfig()
    config.model.preset = preset
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")) as caught:
        check_run_layout(config, resolve_arch(config.model), config.parallel.pipeline_model_parallel_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", ["delayed", "mxfp8"])
def test_every_model_can_be_trained_in_fp8(preset, recipe):
    config = RunConfig()
    config.model.preset, config.precision.fp8 = preset, recipe
    for size in (1, 2, 4, 8) if preset != "tiny" else (1,):
        config.parallel.tensor_model_parallel_size = size
        check_run_layout(config, resolve_arch(config.model), size)
