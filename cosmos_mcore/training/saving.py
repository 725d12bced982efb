"""When a run saves, and what becomes of saves that fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.utils import log_single_rank

from cosmos_mcore.checkpoint.background import BackgroundSave, SaveResult
from cosmos_mcore.checkpoint.distributed import plan_checkpoint, remove_old_checkpoints
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.training_folder import write_training
from cosmos_mcore.training.setup import Run

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run in the background. Every method is called by all ranks together, but for ``flags``.

    Args:
        run: what is saved.
        on_saved: called on rank 0 when a checkpoint is complete on disk, with its iteration and folder.
    """

    def __init__(self, run: Run, on_saved: Callable[[int, Path], None]) -> None:
        self._run, self._settings, self._on_saved = run, run.config.checkpoint, on_saved
        self._save = BackgroundSave(run.checkpoints, self._tidy)
        self._saved_iteration = run.progress.iteration  # what the run started from needs no save
        self._failures = 0
        self._retry_at: float | None = None  # rank 0's clock
        self._checked = False
        self._meanwhile = "Training goes on"
        _before_update(run.optimizer, self._save.fence)

    def prepare(self) -> None:
        """Gets the host memory that GPUs copy to, before the first step, since that takes seconds."""
        run = self._run
        if run.device.type == "cuda" and run.config.parallel.use_distributed_optimizer:
            self._save.prepare(*plan_checkpoint(run.chunks, run.optimizer, asdict(run.progress)))

    def flags(self) -> tuple[int, int]:
        """What this rank has to say before the next ``update``: its part is not done; it is time for another try."""
        waiting = self._save.busy and not self._save.part_done()
        return int(waiting), int(self._retry_at is not None and time.monotonic() >= self._retry_at)

    def update(self, waiting: int, retry: int) -> None:
        """Goes on with the save under way, or tries again.

        Args:
            waiting: whether any rank's part is not done.
            retry: whether it is time for another try.

        Raises:
            ValueError: after ``checkpoint.max_save_failures`` failures in a row.
        """
        if self._save.busy and not waiting:
            self._ended(self._save.advance())
        if retry and not self._save.busy:
            self.save()

    def save(self) -> None:
        """Takes the state as it is now; training may go on when this returns.

        Raises:
            ValueError: after ``checkpoint.max_save_failures`` failures in a row.
        """
        run = self._run
        if self._save.busy:
            began = time.perf_counter()
            self._ended(self._save.wait())
            seconds = time.perf_counter() - began
            if seconds > 1:
                log_single_rank(
                    logger,
                    logging.WARNING,
                    "training waited %.1f s for the save before; raise checkpoint.save_interval",
                    seconds,
                )
        self._retry_at = None
        run.gather_weights()
        progress = asdict(run.progress)
        check, self._checked = not self._checked, True
        self._ended(
            self._save.start(
                run.progress.iteration, lambda: plan_checkpoint(run.chunks, run.optimizer, progress, check)
            )
        )

    def finish(self) -> None:
        """Saves what is not saved yet, and returns when it is complete on disk.

        Raises:
            ValueError: after ``checkpoint.max_save_failures`` failures in a row.
        """
        self._meanwhile = "Training is done and waits for its last checkpoint"
        self._ended(self._save.wait())
        while self._saved_iteration != self._run.progress.iteration:
            if self._failures:
                time.sleep(self._settings.retry_seconds)
            self.save()
            self._ended(self._save.wait())
        self._save.close()

    def _ended(self, result: SaveResult | None) -> None:
        if result is None:
            return
        if not result.errors:
            self._failures, self._saved_iteration = 0, result.iteration
            if result.num_bytes:
                logger.info(
                    "checkpoint of iteration %d: training stood still for %.2f s; %.2f GB on disk after %.1f s; "
                    "%.2f GB of host memory on this rank",
                    *(result.iteration, result.blocked_seconds, result.num_bytes / 1e9, result.total_seconds),
                    result.host_bytes / 1e9,
                )
            if dist.get_rank() == 0:
                self._on_saved(result.iteration, result.path)
            return
        if result.complete:
            self._saved_iteration = result.iteration
        self._failures += 1
        limit = self._settings.max_save_failures
        reasons = "; ".join(result.errors)
        if self._failures >= limit:
            raise ValueError(
                f"{self._failures} saves in a row have failed, the last one with: {reasons}; the newest complete "
                f"checkpoint is {self._newest()}"
            )
        self._retry_at = time.monotonic() + self._settings.retry_seconds if dist.get_rank() == 0 else None
        log_single_rank(
            logger,
            logging.ERROR,
            "SAVING FAILED (%d of at most %d times in a row): checkpoint %s: %s. %s; next try in %.0f s. "
            "The newest complete checkpoint is %s",
            *(self._failures, limit, result.path, reasons, self._meanwhile, self._settings.retry_seconds),
            self._newest(),
        )

    def _newest(self) -> str:
        return f"that of iteration {self._saved_iteration}" if self._saved_iteration else "none"

    def _tidy(self, path: Path) -> None:
        """On rank 0, in the background, when a checkpoint is complete."""
        settings, folder = self._settings, self._run.checkpoints
        if settings.keep is not None:  # first, since it makes room
            remove_old_checkpoints(folder, settings.keep, settings.keep_every, exports=settings.export_original)
        if settings.export_original:
            size = self._run.config.parallel.tensor_model_parallel_size
            write_training(open_checkpoint(path), folder, size, force=True, write_latest=False)


def _before_update(optimizer: MegatronOptimizer, call: Callable[[], None]) -> None:
    """Has ``call`` run before every update: all ways to one lead through ``step_with_ready_grads``."""
    update = optimizer.step_with_ready_grads

    def update_after_call(*args: Any, **kwargs: Any) -> Any:
        call()
        return update(*args, **kwargs)

    optimizer.step_with_ready_grads = update_after_call
