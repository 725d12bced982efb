"""The comparison of two checkpoints, model run included."""

import json

import pytest

from tests.checkpoint.models import random_weights, reduced
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    run_ranks("tests.checkpoint.verify_worker", 1, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("preset", "tokens"), [("12b", 32), ("5b-video2world", 33)])
def test_equal_checkpoints(results, preset, tokens):
    result, weights = results[preset], random_weights(reduced(preset))
    assert result["equal"] and result["largest_difference"] == 0 and not result["different"]
    for side, layout in zip(result["sides"], ("monolithic", "safetensors"), strict=True):
        assert (side["layout"], side["tensors"]) == (layout, len(weights))
        assert side["bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert result["sides"][0]["digest"] == result["sides"][1]["digest"]
    assert result["forward"] == f"{tokens} random tokens, largest difference of the logits 0"
    lines = result["table"].splitlines()
    assert lines[1].split()[:3] == ["input", "monolithic", str(len(weights))]
    assert lines[-1].split() == ["result", "equal"]


def test_one_changed_number_is_found_in_bytes_and_in_the_output(results):
    result = results["different"]
    assert not result["equal"] and result["different"] == ["layers.2.attention.wk.weight"]
    assert result["largest_difference"] == pytest.approx(0.5, abs=0.01)
    assert result["sides"][0]["digest"] != result["sides"][1]["digest"]
    assert not result["forward"].endswith("logits 0")
    assert "DIFFERENT" in result["table"] and "layers.2.attention.wk.weight" in result["table"]


def test_equal_bytes_are_equal_though_not_a_number(results):
    assert results["nan"]["equal"]


def test_different_models(results):
    assert "unexpected" in results["other model"]["error"] and "cross_attention" in results["other model"]["error"]


def test_without_memory_for_the_model_it_says_so(results):
    assert results["no memory"]["equal"]
    assert results["no memory"]["forward"].startswith("skipped: the model needs 1.0 GiB on the cpu, 0.0 GiB are free")


@pytest.mark.parametrize("name", ["training", "back"])
def test_moments_are_compared_too(results, name):
    assert results[name]["equal"]
    assert results[name]["sides"][0]["tensors"] == 3 * len(random_weights(reduced("4b")))


def test_training_loads_every_layout(results):
    assert len(results["loaded"]) == 8 and all(results["loaded"].values()), results["loaded"]
