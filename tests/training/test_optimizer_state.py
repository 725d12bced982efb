"""The optimizer's state through a checkpoint: master weights in halves, bf16 moments, and changes between the forms."""

import json

import pytest

from tests.processes import run_ranks


@pytest.fixture(scope="module")
def curves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    run_ranks("tests.training.optimizer_state_worker", 1, folder)
    return json.loads((folder / "curves.json").read_text())


@pytest.mark.parametrize("form", ["plain", "lean", "fp32"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(curves, form):
    assert curves[f"{form} > {form}"] == curves[form][3:]


@pytest.mark.parametrize("change", ["plain > lean", "lean > plain", "fp32 > plain", "plain > another rate"])
def test_the_form_can_change_on_resume(curves, change):
    expected = curves[change.split(" > ")[0]][3:]
    for (loss, norm), (expected_loss, expected_norm) in zip(curves[change], expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-3)
        assert norm == pytest.approx(expected_norm, rel=5e-2)


def test_lean_forms_learn_as_the_plain_one(curves):
    for loss, plain in zip(curves["lean"], curves["plain"], strict=True):
        assert loss[0] == pytest.approx(plain[0], rel=2e-3)
    assert curves["plain"][-1][0] < curves["plain"][0][0]


@pytest.mark.parametrize("form", ["plain", "lean", "fp32", "unsharded"])
def test_a_gradient_that_is_not_finite_changes_nothing(curves, form):
    assert curves["untouched by nan"][form]
