"""The name table: complete and a bijection. That it is true to real models: test_real_model.py."""

import math

import pytest
import torch

from cosmos_mcore.checkpoint.names import (
    entries,
    fuse,
    original_shapes,
    ours_shape,
    part_shape,
    shard,
    stacked_name,
    stored_tensors,
    unfuse,
)
from cosmos_mcore.model.presets import PRESETS
from tests.checkpoint.models import RELEASED, random_weights, reduced

# spec/model.md section 1: keys of the state dict, parameters, bytes in bf16.
PUBLISHED = {
    "1b": (179, 1_839_271_936, 3_678_543_872),
    "4b": (179, 4_014_088_192, 8_028_176_384),
    "12b": (443, 11_560_975_360, 23_121_950_720),
    "5b-video2world": (291, 4_584_845_312, 9_169_690_624),
    "13b-video2world": (723, 13_323_125_760, 26_646_251_520),
}
ARCHS = {**PRESETS, **{f"reduced {name}": reduced(name) for name in RELEASED}}


@pytest.fixture(params=ARCHS)
def arch(request):
    return ARCHS[request.param]


@pytest.mark.parametrize("preset", RELEASED)
def test_sizes_are_the_published_ones(preset):
    shapes = original_shapes(PRESETS[preset])
    keys, parameters, bf16_bytes = PUBLISHED[preset]
    assert len(shapes) == keys
    assert sum(map(math.prod, shapes.values())) == parameters == bf16_bytes // 2


def test_the_table_is_complete_and_a_bijection(arch):
    shapes = original_shapes(arch)
    originals = [name for entry in entries(arch) for name in entry.originals]
    assert sorted(originals) == sorted(shapes)
    assert len({entry.ours for entry in entries(arch)}) == len(list(entries(arch)))
    for naming in ("originals", "te", "hub"):
        stored = stored_tensors(arch, naming)
        assert len({tensor.name for tensor in stored}) == len(stored), naming
        assert sum(math.prod(part_shape(tensor, shapes, 1)) for tensor in stored) == sum(
            map(math.prod, shapes.values())
        )


def test_every_original_belongs_to_one_stored_tensor(arch):
    for naming in ("originals", "te", "hub"):
        covered = [name for tensor in stored_tensors(arch, naming) for name in tensor.originals]
        assert len(covered) == len(set(covered))
        assert set(covered) == set(original_shapes(arch))


def test_names_of_the_te_backend():
    names = {tensor.name: tensor.originals for tensor in stored_tensors(PRESETS["5b-video2world"], "te")}
    assert names["layers.3.layernorm_mlp.fc1_weight"] == (
        "layers.3.feed_forward.w1.weight",
        "layers.3.feed_forward.w3.weight",
    )
    assert names["layers.3.self_attention.layernorm_qkv.key_weight"] == ("layers.3.attention.wk.weight",)
    assert names["layers.3.inter_attention.key_value.value_weight"] == ("layers.3.cross_attention.wv.weight",)
    assert names["layers.3.inter_attention.layernorm_query.layer_norm_weight"] == (
        "layers.3.cross_attention_norm.weight",
    )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_cutting_and_fusing_are_undone(size):
    arch = reduced("13b-video2world")
    weights = random_weights(arch)
    for entry in entries(arch):
        parts = [weights[name] for name in entry.originals]
        whole = fuse(parts, entry, arch)
        assert tuple(whole.shape) == ours_shape(entry, original_shapes(arch))
        assert all(map(torch.equal, unfuse(whole, entry, arch), parts))
        if entry.split_axis is None:
            continue
        cut = [
            unfuse(fuse([shard(p, entry.split_axis, r, size) for p in parts], entry, arch), entry, arch)
            for r in range(size)
        ]
        joined = [torch.cat(pieces, entry.split_axis) for pieces in zip(*cut, strict=True)]
        assert all(map(torch.equal, joined, parts))


def test_stacked_names():
    assert stacked_name("decoder.layers.12.mlp.linear_fc1.weight") == ("decoder.layers.mlp.linear_fc1.weight", 12)
    assert stacked_name("decoder.final_layernorm.weight") == ("decoder.final_layernorm.weight", None)
