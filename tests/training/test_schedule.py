"""The learning rate against the original's schedulers."""

import pytest
import torch

from cosmos_mcore.config import RunConfig
from cosmos_mcore.training.schedule import learning_rate, linear_factor
from tests.conftest import GOLDEN

CASES = torch.load(GOLDEN / "schedule.pt", weights_only=True)


@pytest.mark.parametrize(
    "case", CASES["experiments"], ids=lambda case: " ".join([case["experiment"], *case["overrides"]])
)
def test_experiments(case):
    settings, config = case["settings"], RunConfig()
    config.optimizer.lr = settings["lr"]
    if case["scheduler"] == "WarmupCosineLR":
        config.schedule.warmup_iters, config.schedule.min_lr = settings["warmup_iters"], settings["min_lr"]
        config.training.train_iters = settings["lr_decay_iters"]  # decay_iters follows
    else:
        config.schedule.name, config.schedule.warmup_iters = "lambda_linear", settings["warmup_steps"]
    tolerance = 1e-12 * settings["lr"]
    found = [learning_rate(config, iteration) for iteration in case["iterations"]]
    assert found == pytest.approx(case["lr"], rel=0, abs=tolerance)
    first = case.get("lr_used_by_first_updates", [0.0])
    assert [learning_rate(config, step) for step in range(len(first))] == pytest.approx(first, rel=0, abs=tolerance)


@pytest.mark.parametrize("case", CASES["lambda_linear_factors"], ids=lambda case: str(case["settings"]))
def test_linear_factor(case):
    settings = case["settings"]
    offset, cooldown = settings.get("warmup_offset", 0), settings.get("cooldown_steps")
    for iteration, expected in zip(case["iterations"], case["factor"], strict=True):
        # The offset delays the warm-up only; we have no such setting, so the start of the curve is shifted here.
        max_iters = settings["max_iter"] - offset if "max_iter" in settings else None
        found = linear_factor(max(0, iteration - offset), settings["warmup_steps"], max_iters, cooldown)
        assert found == pytest.approx(expected, rel=0, abs=1e-12)


def test_decay_iters_may_differ_from_train_iters():
    config = RunConfig()
    config.schedule.warmup_iters, config.schedule.decay_iters = 10, 20
    config.optimizer.lr, config.schedule.min_lr = 1.0, 0.5
    assert [learning_rate(config, i) for i in (5, 10, 15, 20, 21, 49999)] == pytest.approx(
        [0.5, 1, 0.75, 0.5, 0.5, 0.5]
    )


def test_no_warmup_and_no_decay():
    config = RunConfig()
    config.schedule.warmup_iters, config.schedule.decay_iters = 0, 1
    assert learning_rate(config, 0) == config.optimizer.lr
    config.schedule.warmup_iters = config.schedule.decay_iters = 7
    assert learning_rate(config, 7) == config.optimizer.lr
    assert learning_rate(config, 8) == config.schedule.min_lr


def test_lambda_linear_with_cooldown():
    config = RunConfig()
    config.schedule.name, config.schedule.warmup_iters, config.schedule.cooldown_iters = "lambda_linear", 4, 5
    config.training.train_iters, config.optimizer.lr = 20, 2.0
    assert [learning_rate(config, i) for i in (0, 2, 4, 14, 15, 16, 20)] == pytest.approx([0, 1, 2, 2, 2, 1.6, 0])
