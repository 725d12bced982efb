"""Learning rate as a pure function of the iteration (spec/training.md section 2)."""

from __future__ import annotations

import math

from cosmos_mcore.config.schema import RunConfig


def warmup_cosine(iteration: int, lr: float, warmup_iters: int, decay_iters: int, min_lr: float) -> float:
    """Linear from 0 to ``lr`` over ``warmup_iters``, then a half cosine down to ``min_lr`` at ``decay_iters``."""
    if iteration < warmup_iters:
        return lr * iteration / warmup_iters
    if iteration > decay_iters:
        return min_lr
    if decay_iters == warmup_iters:
        return lr
    done = (iteration - warmup_iters) / (decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * done)) * (lr - min_lr)


def linear_factor(
    iteration: int, warmup_iters: int, max_iters: int | None = None, cooldown_iters: int | None = None
) -> float:
    """Linear from 0 to 1 over ``warmup_iters``, then 1; with a cool-down linear to 0 over its length at the end."""
    if iteration < warmup_iters:
        return iteration / warmup_iters
    if cooldown_iters is None:
        return 1.0
    assert max_iters is not None
    return min(1.0, max(0.0, (max_iters - iteration) / cooldown_iters))


def learning_rate(config: RunConfig, iteration: int) -> float:
    """The rate of optimizer step number ``iteration`` (from 0: the first step of a warm-up has rate 0)."""
    schedule, peak = config.schedule, config.optimizer.lr
    decay_iters = schedule.decay_iters if schedule.decay_iters is not None else config.training.train_iters
    if schedule.name == "warmup_cosine":
        return warmup_cosine(iteration, peak, schedule.warmup_iters, decay_iters, schedule.min_lr)
    return peak * linear_factor(iteration, schedule.warmup_iters, decay_iters, schedule.cooldown_iters)
