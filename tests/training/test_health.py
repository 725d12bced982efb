"""Steps that are not finite are counted and named; a sudden loss is noted."""

import logging
import math

import pytest

from cosmos_mcore.training.health import Health


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("cosmos_mcore"), "propagate", True)
    caplog.set_level(logging.WARNING, "cosmos_mcore")
    return caplog


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_steps_that_are_not_finite_end_the_run_at_the_limit(warnings, loss, norm):
    health = Health(max_nan_iterations=3)
    for iteration in range(1, 3):
        health.check(iteration, loss, norm, lambda: "bad.mp4 from frame 7")
    assert health.nan_iterations == 2
    assert "NOT FINITE, the step was skipped (2 in a row): iteration 2" in warnings.text
    assert "bad.mp4 from frame 7" in warnings.text
    health.check(3, 1.0, 1.0, str)  # a good one starts the count again
    for iteration in (4, 5):
        health.check(iteration, loss, norm, str)
    with pytest.raises(ValueError, match="3 steps in a row .* bad.mp4.*Lower optimizer.lr"):
        health.check(6, loss, norm, lambda: "bad.mp4")


def test_a_spike_is_noted_once_and_noise_is_not(warnings):
    health = Health(max_nan_iterations=1)
    for iteration in range(60):
        health.check(iteration, 3.0 + 0.1 * math.sin(iteration), 1.0, str)
    assert warnings.text == ""
    health.check(60, 4.5, 1.0, lambda: "odd.mp4 from frame 0")
    health.check(61, 3.0, 1.0, str)
    assert warnings.text.count("loss spike") == 1
    assert "loss spike at iteration 60: 4.5000" in warnings.text and "odd.mp4" in warnings.text
