"""Sizes of the model family and what the config may change."""

import math

import pytest

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config.schema import ModelConfig
from cosmos_mcore.model.presets import PRESETS, resolve_arch

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
