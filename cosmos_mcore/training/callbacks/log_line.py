"""Megatron's log line, with its field names since people search for them, and a progress bar on a terminal."""

from __future__ import annotations

import logging
import math
import sys
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from cosmos_mcore.training.callbacks.base import Callback, StepReport
from cosmos_mcore.training.token_stats import Stats

logger = logging.getLogger(__name__)


def log_line(report: StepReport) -> str:
    """One iteration in Megatron's words."""
    fields = [
        f"iteration {report.iteration:8d}/{report.train_iters:8d}",
        f"consumed samples: {report.consumed_samples:12d}",
        f"elapsed time per iteration (ms): {report.step_seconds * 1e3:.1f}",
        f"data wait (ms): {report.data_seconds * 1e3:.1f}",
        f"throughput per GPU (TFLOP/s/GPU): {report.tflops:.1f}",
        f"tokens/s/GPU: {report.tokens_per_second:.0f}",
        f"learning rate: {report.learning_rate:.6E}",
        f"global batch size: {report.global_batch_size:5d}",
        f"lm loss: {report.lm_loss:.6E}",
        f"z loss: {report.z_loss:.6E}",
        f"grad norm: {report.grad_norm:.3f}",
        f"number of skipped iterations: {report.skipped_iterations:3d}",
        f"number of nan iterations: {report.nan_iterations:3d}",
        f"memory (GiB): {report.memory_gib:.1f}",
    ]
    if report.mfu is not None:
        fields.append(f"MFU: {report.mfu:.3f}")
    if report.token_accuracy is not None:
        fields.append(f"token accuracy: {report.token_accuracy:.4f}")
    fields += [f"lm loss of latent frame {i}: {loss:.4f}" for i, loss in enumerate(report.frame_losses, 1)]
    return f" [{datetime.now():%Y-%m-%d %H:%M:%S}] " + " | ".join(fields) + " |"


def validation_line(iteration: int, stats: Stats) -> str:
    """A validation in Megatron's words."""
    fields = [f"validation loss at iteration {iteration}", f"lm loss value: {stats.loss:.6E}"]
    fields.append(f"lm loss PPL: {math.exp(min(20.0, stats.loss)):.6E}")
    if stats.token_accuracy is not None:
        fields.append(f"token accuracy: {stats.token_accuracy:.4f}")
    return " " + " | ".join(fields) + " |"


class LogLine(Callback):
    """Writes one line per report, and one per checkpoint."""

    def on_report(self, report: StepReport) -> None:
        """Writes the line."""
        logger.info(log_line(report))
        if report.validation is not None:
            logger.info(validation_line(report.iteration, report.validation))

    def on_save(self, iteration: int, path: Path) -> None:
        """Names the checkpoint."""
        logger.info("saved checkpoint %s", path)


class ProgressBar(Callback):
    """A bar with the time left, drawn only where standard error is a terminal."""

    def __init__(self, train_iters: int) -> None:
        self.train_iters = train_iters
        self.bar: tqdm | None = None

    def on_train_start(self, iteration: int) -> None:
        """Starts the bar at the iteration of the checkpoint."""
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.train_iters, initial=iteration, unit="it", desc="training", dynamic_ncols=True)

    def on_report(self, report: StepReport) -> None:
        """Moves the bar."""
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{report.lm_loss:.3f}", refresh=False)
            self.bar.update(report.iteration - self.bar.n)

    def on_train_end(self) -> None:
        """Leaves the bar on the screen."""
        if self.bar is not None:
            self.bar.close()
