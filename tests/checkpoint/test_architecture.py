"""The architecture read from tensors' shapes."""

from dataclasses import replace

import pytest
import torch

from cosmos_mcore.checkpoint.architecture import arch_of_size, check_tensors, describe, detect_arch
from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.model.presets import PRESETS
from tests.checkpoint.models import RELEASED, reduced
from tests.golden_model import golden_arch


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_recognised_with_yarn(preset):
    assert detect_arch(original_shapes(PRESETS[preset]), "model.pt") == PRESETS[preset]
    assert describe(PRESETS[preset]) == preset


@pytest.mark.parametrize("preset", RELEASED)
def test_other_sizes_are_read_from_shapes(preset):
    arch = reduced(preset)
    assert detect_arch(original_shapes(arch), "model.pt") == replace(arch, yarn=None)


@pytest.mark.parametrize("case", ["base", "yarn", "video2world"])
def test_golden_models(golden_dir, case):
    content = torch.load(golden_dir / f"{case}.pt", weights_only=True)
    shapes = {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in content["state_dict"].items()}
    expected = golden_arch(content["config"], shapes["tok_embeddings.weight"][0])
    assert detect_arch(shapes, case) == replace(expected, yarn=None)


@pytest.mark.parametrize("size", ["1b", "4b", "5B", "12b", "13b"])
def test_the_size_may_be_named(size):
    preset = next(name for name in PRESETS if name.startswith(size.lower()))
    assert arch_of_size(size, original_shapes(PRESETS[preset]), "model.pt") == PRESETS[preset]


def test_a_wrong_size_names_the_tensor():
    with pytest.raises(
        ValueError, match=r"model.pt: is not a 12b model: tok_embeddings.weight is \[64000, 4096\], not"
    ):
        arch_of_size("12b", original_shapes(PRESETS["4b"]), "model.pt")
    with pytest.raises(ValueError, match="--model_size 7b is unknown; known: auto, 1b, 4b"):
        arch_of_size("7b", {}, "model.pt")


@pytest.mark.parametrize("layers", [40, 7])  # one with another number of layers, too: its vocabulary tells
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_part_of_a_released_model_is_not_taken_for_a_smaller_one(parts, layers):
    arch = replace(
        PRESETS["12b"],
        num_layers=layers,
        ffn_hidden_size=14336 // parts,
        num_attention_heads=32 // parts,
        num_query_groups=8 // parts,
        vocab_size=64000 // parts,
        embedding_size=64000 // parts,
    )
    with pytest.raises(ValueError, match=f"x.pt: holds 1/{parts} of a 12b model; are shard files missing?"):
        detect_arch(original_shapes(arch), "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("norm.weight"), "norm.weight is missing"),
        (lambda s: s.update({"layers.0.attention.wq.weight": (8,)}), r"layers.0.attention.wq.weight has shape \[8\]"),
        (lambda s: s.update({"layers.0.attention.q_norm.weight": (0,)}), r"q_norm.weight has shape \[0\]"),
        (lambda s: s.clear(), "norm.weight is missing; this is not a Cosmos video model"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(change, message):
    shapes = original_shapes(reduced("4b"))
    change(shapes)
    with pytest.raises(ValueError, match=message) as error:
        detect_arch(shapes, "model.pt")
    assert "\n" not in str(error.value)


def test_differences_are_listed_with_the_nearest_names():
    expected = original_shapes(reduced("4b"))
    found = dict(expected)
    found["layers.1.attention.w_q.weight"] = found.pop("layers.1.attention.wq.weight")
    found["norm.weight"] = (7,)
    for layer in range(4):
        del found[f"layers.{layer}.ffn_norm.weight"]
    with pytest.raises(ValueError) as error:
        check_tensors(found, expected, "X")
    assert str(error.value) == (
        "X: 5 missing: layers.0.ffn_norm.weight, "
        "layers.1.attention.wq.weight (nearest: layers.1.attention.w_q.weight), layers.1.ffn_norm.weight and 2 more; "
        "1 unexpected: layers.1.attention.w_q.weight (nearest: layers.1.attention.wq.weight); "
        "1 misshapen: norm.weight is [7], not [256]"
    )
    check_tensors(expected, expected, "X")
