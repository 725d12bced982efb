"""The loop: next clips, one step, report, save."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from cosmos_mcore.config import run_dir, to_yaml
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.index import SkippedFile
from cosmos_mcore.data.loader import Batch
from cosmos_mcore.parallel.agreement import Exchange, gather_to_all, largest
from cosmos_mcore.training.callbacks import (
    Callback,
    LogLine,
    MetricsFile,
    ProgressBar,
    StepReport,
    TensorBoard,
    WandB,
)
from cosmos_mcore.training.evaluation import Validation
from cosmos_mcore.training.flops import flops_per_clip, peak_tflops
from cosmos_mcore.training.health import Health
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.profiling import Profiler, report_stragglers
from cosmos_mcore.training.samples import Samples
from cosmos_mcore.training.saving import Saver
from cosmos_mcore.training.schedule import learning_rate
from cosmos_mcore.training.setup import Progress, Run
from cosmos_mcore.training.step import StepResult, train_step
from cosmos_mcore.training.stopping import Reason, StopRequests
from cosmos_mcore.training.teacher_forcing import TeacherForcing
from cosmos_mcore.training.token_stats import Stats, TokenStats

logger = logging.getLogger(__name__)

_CLIPS_NAMED = 3  # of a step whose loss is large
_SECONDS_BETWEEN_REQUESTS = 0.05  # between two looks at requests to stop while clips are waited for


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
        stops: who may stop the run; None: only a file.
    """

    def __init__(
        self, run: Run, callbacks: Sequence[Callback] | None = None, stops: StopRequests | None = None
    ) -> None:
        self.run, self.config, self.progress = run, run.config, run.progress
        self.positions = TokenStats(run.layout, run.arch, run.config.model.z_loss_coeff, run.device, run.chunks)
        self.callbacks: Sequence[Callback] = ()
        if dist.get_rank() == 0:
            self.callbacks = default_callbacks(run.config) if callbacks is None else callbacks
        self._failing: set[Callback] = set()
        self.resumed_from = self.progress.iteration or None
        self.skipped_iterations = 0
        self.watch = StopWatch()
        self.stops = stops if stops is not None else StopRequests(run_dir(run.config), None)
        self.saver = Saver(run, self._saved)
        self.health = Health(run.config.training.max_nan_iterations)
        self.profiler = Profiler(run.config)
        settings, on_gpu = run.config.logging, run.device.type == "cuda"
        self.peak_tflops = peak_tflops(torch.cuda.get_device_name(run.device)) if on_gpu else None
        self.validation = Validation(run, lambda: bool(self.stops.poll())) if run.validation is not None else None
        self.teacher_forcing = TeacherForcing(run) if settings.teacher_forcing_interval is not None else None
        self.samples = Samples(run, self._sampled) if settings.sample_interval is not None else None

    def train(self) -> Reason:
        """Runs the remaining iterations; saves every ``checkpoint.save_interval``, at the end, and when asked to stop.

        Returns:
            Why it has ended before the last iteration, if it has.
        """
        for callback in self.callbacks:
            callback.on_train_start(self.progress.iteration)
        if self.progress.iteration < self.config.training.train_iters:
            self.saver.prepare()
        self.watch.restart()
        try:
            reason = self._loop(self.config.training.train_iters, self.config.checkpoint.save_interval)
            if reason:
                logger.info("asked to stop by %s after iteration %d: saving", reason, self.progress.iteration)
            self.saver.finish()
        finally:
            self.profiler.close()
            for part in (self.teacher_forcing, self.samples, self.run.validation, self.run.loader):
                if part is not None:
                    part.close()
            self._tell(lambda callback: callback.on_train_end())
        if reason:
            logger.info("stopped by %s after iteration %d; everything is saved", reason, self.progress.iteration)
        return reason

    def _loop(self, train_iters: int, save_interval: int) -> Reason:
        if self.progress.iteration >= train_iters:
            logger.info("nothing to do: %d of %d iterations are done", self.progress.iteration, train_iters)
        # The numbers of a step are read while the next one runs, so the device never waits for the host.
        unread: Callable[..., None] | None = None
        reason, clips_missing = Reason.NONE, 1
        while self.progress.iteration < train_iters:
            waiting_since = time.perf_counter()
            if clips_missing:
                reason = self._wait_for_clips()
            if reason:
                break
            batch = self.run.loader.next()
            waited = time.perf_counter() - waiting_since
            # What the hosts have to tell each other travels while they are busy with the step.
            flags = Exchange((self.stops.poll(), not self.run.loader.ready(), *self.saver.flags()))
            self.profiler.before_step(self.progress.iteration)
            following = self.progress.iteration + 1
            pause = self._interrupts(following) or following % save_interval == 0 or following == train_iters
            if pause and unread is not None:
                unread()  # or the time of the step before would count to both
                unread = None
            started = self._start_step(batch, waited)
            if unread is not None:
                unread()
            unread = started
            if self._interrupts(self.progress.iteration):
                unread(partial(self._measure, batch, waited))
                unread = None
                self.watch.restart()
            elif self.run.device.type == "cpu":  # it has done the step already
                unread()
                unread = None
            stop, clips_missing, *of_saver = flags.result()
            reason = Reason(stop)
            self.saver.update(*of_saver)
            if self.progress.iteration % save_interval == 0:
                if unread is not None:
                    unread()
                    unread = None
                self.saver.save()
                self.watch.restart()
        if unread is not None:
            unread()
        return reason

    def _start_step(self, batch: Batch, waited: float) -> Callable[..., None]:
        """Starts the next step; what it returns waits for the step's end and reports it."""
        lr = learning_rate(self.config, self.progress.iteration)
        first_sample = self.progress.consumed_samples
        reports = self._reports(self.progress.iteration + 1)
        self.positions.start_step()
        self.positions.measure_accuracy = reports
        set_learning_rate(self.run.optimizer, lr)
        size = self.config.training.micro_batch_size
        pending = train_step(self.run.model, self.run.optimizer, self.positions, batch.ids, size, batch.context)
        self.progress.iteration += 1
        self.progress.consumed_samples = self.run.loader.consumed_samples
        done, clip_losses = replace(self.progress), self.positions.clip_losses
        stats = self.positions.start_reading() if reports else None

        def finish(measure: Callable[[], Stats | None] = lambda: None) -> None:
            result = pending.read()
            self.watch.step_done(waited)
            self.skipped_iterations += not result.updated
            self.health.check(
                done.iteration, result.loss, result.grad_norm, lambda: self._clips(first_sample, clip_losses)
            )
            times = self.watch.means() if stats is not None else None
            validation = measure()
            if stats is not None and times is not None:
                self._report(done, result, lr, times, stats.read(), validation)

        return finish

    def _reports(self, iteration: int) -> bool:
        """Whether the numbers of this step are reported."""
        return iteration % self.config.logging.log_interval == 0 or self._validates(iteration)

    def _validates(self, iteration: int) -> bool:
        return self.validation is not None and iteration % self.config.training.eval_interval == 0

    def _interrupts(self, iteration: int) -> bool:
        """Whether anything but the next step, or a save, comes after this one."""
        settings = self.config.logging
        intervals = (settings.teacher_forcing_interval, settings.sample_interval, settings.straggler_interval)
        return self._validates(iteration) or any(every and iteration % every == 0 for every in intervals)

    def _measure(self, batch: Batch, waited: float) -> Stats | None:
        """All that is measured between two steps; returns the validation's numbers, if they were."""
        iteration, settings = self.progress.iteration, self.config.logging
        if self.teacher_forcing is not None and iteration % (settings.teacher_forcing_interval or 1) == 0:
            first_sample = self.progress.consumed_samples - self.config.training.global_batch_size
            self.teacher_forcing.measure(iteration, batch, first_sample)
        if self.samples is not None and iteration % (settings.sample_interval or 1) == 0:
            self.samples.take(iteration)
        if settings.straggler_interval is not None and iteration % settings.straggler_interval == 0:
            report_stragglers(self.run.device, iteration, waited)
        if self.validation is not None and self._validates(iteration):
            return self.validation.measure()
        return None

    def _clips(self, first_sample: int, clip_losses: Sequence[Tensor]) -> str:
        """Names a step's clips with a loss that is not finite, or those with the largest losses. All ranks."""
        mine: dict[int, float] = {}
        if clip_losses and parallel_state.get_tensor_model_parallel_rank() == 0:
            losses = torch.cat(list(clip_losses)).tolist()
            first = first_sample + parallel_state.get_data_parallel_rank() * len(losses)
            mine = {first + i: loss for i, loss in enumerate(losses)}
        total: dict[int, float] = {}
        for part in gather_to_all(mine):
            for position, loss in part.items():  # context-parallel ranks have parts of a clip's loss
                total[position] = total.get(position, 0.0) + loss
        bad = [position for position, loss in total.items() if not math.isfinite(loss)]
        worst = sorted(total, key=lambda position: -total[position])[:_CLIPS_NAMED]
        clips = [self.run.loader.clip_at(position) for position in bad or worst]
        return ", ".join(f"{clip.path} from frame {clip.first_frame}" for clip in clips)

    def _wait_for_clips(self) -> Reason:
        """Waits until every replica has its next clips; a request to stop ends the wait."""
        while True:
            ready = self.run.loader.ready(_SECONDS_BETWEEN_REQUESTS)
            stop, missing, *of_saver = largest(self.stops.poll(), not ready, *self.saver.flags())
            self.saver.update(*of_saver)
            if stop or not missing:
                return Reason(stop)

    def _tell(self, call: Callable[[Callback], None]) -> None:
        """Tells every callback; a disk that is full or gone costs what they write, not the run."""
        for callback in self.callbacks:
            try:
                call(callback)
                self._failing.discard(callback)
            except OSError as error:
                if callback not in self._failing:  # said once, not at every step
                    logger.warning("%s cannot write (%s); training goes on", type(callback).__name__, error)
                self._failing.add(callback)

    def _saved(self, iteration: int, path: Path) -> None:
        self._tell(lambda callback: callback.on_save(iteration, path))

    def _sampled(self, iteration: int, strip: Path) -> None:
        for callback in self.callbacks:
            callback.on_sample(iteration, strip)

    def _report(
        self,
        done: Progress,
        result: StepResult,
        lr: float,
        times: tuple[float, float],
        stats: Stats,
        validation: Stats | None,
    ) -> None:
        step_seconds, data_seconds = times
        skipped = self._gather_skipped()
        clips = self.config.training.global_batch_size / dist.get_world_size() / step_seconds
        tflops = clips * flops_per_clip(self.run.arch, self.run.layout.sequence_length) / 1e12
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
            tflops=tflops,
            skipped_iterations=self.skipped_iterations,
            nan_iterations=self.health.nan_iterations,
            skipped_files=skipped,
            resumed_from=self.resumed_from,
            mfu=None if self.peak_tflops is None else tflops / self.peak_tflops,
            memory_gib=_memory_gib(),
            token_accuracy=stats.token_accuracy,
            frame_losses=stats.frame_losses,
            validation=validation,
        )
        self.resumed_from = None
        self._tell(lambda callback: callback.on_report(report))

    def _gather_skipped(self) -> list[SkippedFile]:
        """Files that any rank found unusable since the last report, each once in a run, on every rank."""
        found = [file for box in gather_to_all(self.run.loader.drain_skipped()) for file in box]
        new = self.run.loader.name_skipped(found)
        for file in new if dist.get_rank() == 0 else ():
            logger.warning("skipped %s: %s", file.path, file.reason)
        return new


def _memory_gib() -> float:
    """Largest memory on the GPU so far, in GiB; where there is none, the process's at this moment."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


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
