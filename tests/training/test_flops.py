"""Parameter and FLOP counts by the convention of spec/benchmarks.md section 7."""

import pytest

from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.training.flops import flops_per_clip, num_parameters

B4 = PRESETS["4b"]


def test_parameters():
    assert num_parameters(B4) == 4_014_088_192
    assert num_parameters(B4, with_embedding=False) == 4_014_088_192 - 64000 * 4096


@pytest.mark.parametrize(("length", "matmuls", "attention"), [(4800, 1.08e14, 9.1e12), (10600, 2.39e14, 4.4e13)])
def test_one_clip_of_the_4b_model(length, matmuls, attention):
    assert 6 * num_parameters(B4, with_embedding=False) * length == pytest.approx(matmuls, rel=5e-3)
    extra = flops_per_clip(B4, length) - 6 * num_parameters(B4, with_embedding=False) * length
    assert extra == pytest.approx(attention, rel=1e-2)


def test_text_counts_by_its_own_length():
    v5, length, text = PRESETS["5b-video2world"], 12801, 512
    width, groups, ffn = 4096, 1024, 14336
    layer = length * (2 * 2 * width**2 + 2 * width * groups + 3 * width * ffn) + text * 2 * 1024 * groups
    products = length**2 / 2 * 2 * width + length * text * 2 * width
    expected = 6 * (16 * (layer + products) + length * width * 64000)
    assert flops_per_clip(v5, length) == pytest.approx(expected, rel=1e-4)


def test_attention_counts_the_heads_width_not_the_models():
    b12, length = PRESETS["12b"], 1000
    extra = flops_per_clip(b12, length) - 6 * num_parameters(b12, with_embedding=False) * length
    assert extra == 6 * 40 * length**2 * 4096
