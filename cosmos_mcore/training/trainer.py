"""The loop: next clips, one step, report, save."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch.distributed as dist

from cosmos_mcore.checkpoint.distributed import remove_old_checkpoints, save_checkpoint
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.training_folder import write_training
from cosmos_mcore.config import run_dir, to_yaml
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.index import SkippedFile
from cosmos_mcore.training.callbacks import (
    Callback,
    LogLine,
    MetricsFile,
    ProgressBar,
    StepReport,
    TensorBoard,
    WandB,
)
from cosmos_mcore.training.flops import flops_per_clip
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.schedule import learning_rate
from cosmos_mcore.training.setup import Progress, Run
from cosmos_mcore.training.step import LossPositions, StepResult, train_step

logger = logging.getLogger(__name__)


class StopWatch:
    """Wall time between the ends of steps, and the part of it spent waiting for clips."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was measured; call it after anything that is no step."""
        self.since, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def step_done(self, waited: float) -> None:
        """Counts a step that has ended now and had waited so many seconds for its clips."""
        self.waited += waited
        self.steps += 1

    def means(self) -> tuple[float, float]:
        """Seconds per step, and seconds of it that it waited; starts again."""
        now = time.perf_counter()
        means = (now - self.since) / self.steps, self.waited / self.steps
        self.restart()
        return means


class Trainer:
    """Trains a run to its end, from wherever its newest checkpoint is.

    Args:
        run: the parts, as ``set_up`` makes them.
        callbacks: told on rank 0 only; None: those that ``config.logging`` asks for.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback] | None = None) -> None:
        self.run, self.config, self.progress = run, run.config, run.progress
        self.positions = LossPositions(run.layout, run.arch, run.config.model.z_loss_coeff, run.device)
        self.callbacks: Sequence[Callback] = ()
        if dist.get_rank() == 0:
            self.callbacks = default_callbacks(run.config) if callbacks is None else callbacks
        self.resumed_from = self.progress.iteration or None
        self.skipped_iterations = self.nan_iterations = 0
        self.watch = StopWatch()

    def train(self) -> None:
        """Runs the remaining iterations; saves every ``checkpoint.save_interval`` and at the end."""
        training = self.config.training
        for callback in self.callbacks:
            callback.on_train_start(self.progress.iteration)
        self.watch.restart()
        try:
            self._loop(training.train_iters, self.config.checkpoint.save_interval)
        finally:
            self.run.loader.close()
            for callback in self.callbacks:
                callback.on_train_end()

    def _loop(self, train_iters: int, save_interval: int) -> None:
        if self.progress.iteration >= train_iters:
            logger.info("nothing to do: %d of %d iterations are done", self.progress.iteration, train_iters)
        # The numbers of a step are read while the next one runs, so the device never waits for the host.
        unread: Callable[[], None] | None = None
        while self.progress.iteration < train_iters:
            started = self._start_step()
            if unread is not None:
                unread()
            unread = started
            if self.progress.iteration % save_interval == 0 or self.progress.iteration == train_iters:
                unread()
                unread = None
                self.save()
                self.watch.restart()

    def _start_step(self) -> Callable[[], None]:
        """Starts the next step; what it returns waits for the step's end and reports it."""
        waiting_since = time.perf_counter()
        tokens = self.run.loader.next()
        waited = time.perf_counter() - waiting_since
        lr = learning_rate(self.config, self.progress.iteration)
        set_learning_rate(self.run.optimizer, lr)
        pending = train_step(
            self.run.model, self.run.optimizer, self.positions, tokens, self.config.training.micro_batch_size
        )
        self.progress.iteration += 1
        self.progress.consumed_samples = self.run.loader.consumed_samples
        done = replace(self.progress)

        def finish() -> None:
            result = pending.read()
            self.watch.step_done(waited)
            self.skipped_iterations += not result.updated
            self.nan_iterations += not math.isfinite(result.loss)
            if done.iteration % self.config.logging.log_interval == 0:
                self._report(done, result, lr)

        return finish

    def save(self) -> None:
        """Writes a checkpoint; returns when it is complete on disk."""
        run, folder = self.run, self.run.checkpoints
        path = save_checkpoint(folder, self.progress.iteration, run.chunks, run.optimizer, asdict(self.progress))
        if dist.get_rank() == 0:
            if self.config.checkpoint.export_original:
                size = self.config.parallel.tensor_model_parallel_size
                write_training(open_checkpoint(path), folder, size, force=True, write_latest=False)
            if self.config.checkpoint.keep is not None:
                remove_old_checkpoints(folder, self.config.checkpoint.keep)
        dist.barrier()
        for callback in self.callbacks:
            callback.on_save(self.progress.iteration, path)

    def _report(self, done: Progress, result: StepResult, lr: float) -> None:
        step_seconds, data_seconds = self.watch.means()
        skipped = self._gather_skipped()
        clips = self.config.training.global_batch_size / dist.get_world_size() / step_seconds
        report = StepReport(
            iteration=done.iteration,
            train_iters=self.config.training.train_iters,
            consumed_samples=done.consumed_samples,
            lm_loss=result.loss,
            z_loss=result.z_loss,
            grad_norm=result.grad_norm,
            learning_rate=lr,
            global_batch_size=self.config.training.global_batch_size,
            step_seconds=step_seconds,
            data_seconds=data_seconds,
            tokens_per_second=clips * self.run.layout.sequence_length,
            tflops=clips * flops_per_clip(self.run.arch, self.run.layout.sequence_length) / 1e12,
            skipped_iterations=self.skipped_iterations,
            nan_iterations=self.nan_iterations,
            skipped_files=skipped,
            resumed_from=self.resumed_from,
        )
        self.resumed_from = None
        for callback in self.callbacks:
            callback.on_report(report)

    def _gather_skipped(self) -> list[SkippedFile]:
        """Files that any rank found unusable since the last report, each once in a run, on every rank."""
        found = self.run.loader.drain_skipped()
        if dist.get_world_size() > 1:
            boxes: list[list[SkippedFile]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(boxes, found)
            found = [file for box in boxes for file in box]
        new = self.run.loader.name_skipped(found)
        for file in new if dist.get_rank() == 0 else ():
            logger.warning("skipped %s: %s", file.path, file.reason)
        return new


def default_callbacks(config: RunConfig) -> list[Callback]:
    """The callbacks that ``config.logging`` asks for; makes the run's folder and writes the resolved config into it."""
    folder = run_dir(config)
    _write_config(config, folder)
    callbacks: list[Callback] = [LogLine(), MetricsFile(folder / "metrics.jsonl")]
    if config.logging.progress_bar:
        callbacks.append(ProgressBar(config.training.train_iters))
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard"))
    if config.logging.wandb_project is not None:
        callbacks.append(WandB(config.logging.wandb_project, config.job.name, asdict(config)))
    return callbacks


def _write_config(config: RunConfig, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "config.yaml.incomplete"
        temporary.write_text(to_yaml(config))
        os.replace(temporary, folder / "config.yaml")
    except OSError as error:
        raise ValueError(
            f"the run's folder {folder} cannot be written ({error}); set OUTPUT_ROOT to a folder that can"
        ) from None
