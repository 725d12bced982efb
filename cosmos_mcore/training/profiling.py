"""Torch's profiler for some steps of some ranks, and a comparison of all ranks' speed."""

from __future__ import annotations

import logging
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.utils import log_single_rank

from cosmos_mcore.config.derived import run_dir
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.parallel.agreement import gather_to_all

logger = logging.getLogger(__name__)

_MATRIX = {"cuda": 4096, "cpu": 512}  # rows of the matrix product that every rank times
_REPEATS = 5
_SLOW = 1.1  # of the median, from which on a rank is named


class Profiler:
    """Records steps ``logging.profile_step_start`` to ``profile_step_end`` - 1 on ``logging.profile_ranks``.

    The trace goes to ``profile/rank_{R}.json.gz`` in the run's folder, for Perfetto or chrome://tracing.
    """

    def __init__(self, config: RunConfig) -> None:
        settings = config.logging
        self._start, self._end = settings.profile_step_start, settings.profile_step_end
        self._mine = self._start is not None and dist.get_rank() in settings.profile_ranks
        self._path: Path = run_dir(config) / "profile" / f"rank_{dist.get_rank()}.json.gz"
        self._profiler: Any = None

    def before_step(self, iteration: int) -> None:
        """Starts or ends the recording; ``iteration`` steps are done."""
        if self._mine and iteration == self._start:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profiler.start()
        elif iteration == self._end:
            self.close()

    def close(self) -> None:
        """Writes the trace, if one is being recorded."""
        if self._profiler is None:
            return
        self._profiler.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._path))
            logger.info("profile written to %s", self._path)
        except OSError as error:
            logger.warning("the profile %s cannot be written (%s); training goes on", self._path, error)
        self._profiler = None


def report_stragglers(device: torch.device, iteration: int, data_seconds: float) -> None:
    """Times the same matrix product on every rank and names those that are slow. All ranks; a few milliseconds.

    All ranks' steps last equally long, since they wait for each other; what each can do alone tells which one they
    wait for.

    Args:
        device: of this rank.
        iteration: for the log.
        data_seconds: what this rank has waited for clips per step.
    """
    mine = (_time_product(device), data_seconds, socket.gethostname())
    ranks = gather_to_all(mine)
    usual = statistics.median(seconds for seconds, _, _ in ranks)
    slowest = max(range(len(ranks)), key=lambda rank: ranks[rank][0])
    waiting = max(range(len(ranks)), key=lambda rank: ranks[rank][1])
    logger.info(
        "iteration %d, speed of %d ranks: median %.2f ms for the test product; slowest rank %d on %s: %.2f ms; longest "
        "wait for clips: rank %d on %s, %.1f ms per step",
        *(iteration, len(ranks), 1e3 * usual, slowest, ranks[slowest][2], 1e3 * ranks[slowest][0]),
        *(waiting, ranks[waiting][2], 1e3 * ranks[waiting][1]),
    )
    slow = [f"{rank} on {host} ({seconds / usual:.2f}x)" for rank, (seconds, _, host) in enumerate(ranks)
            if seconds > _SLOW * usual]  # fmt: skip
    if slow:
        log_single_rank(logger, logging.WARNING, "iteration %d: slow ranks: %s", iteration, ", ".join(slow))


def _time_product(device: torch.device) -> float:
    """Seconds of the fastest of a few matrix products."""
    size = _MATRIX[device.type]
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    times = []
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        matrix @ matrix
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
