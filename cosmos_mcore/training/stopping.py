"""Asking a run to stop: it finishes its step, saves and exits with a code that says whether it wants to go on."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import Any

from cosmos_mcore.parallel.command_line import lost_peer
from cosmos_mcore.parallel.launch import is_rank_zero

logger = logging.getLogger(__name__)

CONTINUE = 75  # exit code: saved, not finished, to be started again (sysexits.h calls it a temporary failure)
STOPPED = 76  # exit code: saved, not finished, and somebody wants it so
STOP_FILE = "stop"  # in the run's folder
EXIT_CODE_FILE = "exit_code"  # beside it: torchrun's own exit code is 0 or 1, whatever its ranks return
_SECONDS_BETWEEN_LOOKS = 1.0  # at the stop file, which lies on a shared file system


class Reason(IntEnum):
    """Why a run stops before its end. Of several the largest counts."""

    NONE = 0
    TIME = 1
    SIGUSR1 = 2
    SIGTERM = 3
    REQUEUE_FILE = 4
    SIGUSR2 = 5
    STOP_FILE = 6

    @property
    def exit_code(self) -> int:
        """What the batch file gets to see."""
        return STOPPED if self >= Reason.SIGUSR2 else CONTINUE if self else 0

    def __str__(self) -> str:
        return _WORDS[self]


_WORDS = {
    Reason.NONE: "nothing",
    Reason.TIME: "training.exit_duration_minutes",
    Reason.SIGUSR1: "SIGUSR1",
    Reason.SIGTERM: "SIGTERM",
    Reason.REQUEUE_FILE: f"the file {STOP_FILE}, which says requeue",
    Reason.SIGUSR2: "SIGUSR2",
    Reason.STOP_FILE: f"the file {STOP_FILE}",
}
_SIGNALS = {signal.SIGTERM: Reason.SIGTERM, signal.SIGUSR1: Reason.SIGUSR1, signal.SIGUSR2: Reason.SIGUSR2}


class StopRequests:
    """What this rank has been asked so far.

    Args:
        folder: the run's; ``folder/stop`` stops the run, and for a later start if it holds the word requeue.
        minutes: how long the run may take from now on; None: no limit.
    """

    def __init__(self, folder: Path, minutes: float | None) -> None:
        self._file = folder / STOP_FILE
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._reason = Reason.NONE
        self._next_look = 0.0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals; puts back what was there before."""
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            yield
        except RuntimeError as error:
            if lost_peer(error) and self._reason is Reason.SIGTERM:
                # Another rank has failed, and the launcher wants this one to end.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def poll(self) -> Reason:
        """The weightiest reason to stop that this rank knows; rank 0 looks at the clock and at the file."""
        if is_rank_zero():
            now = time.monotonic()
            if self._deadline is not None and now >= self._deadline:
                self._reason = max(self._reason, Reason.TIME)
            if now >= self._next_look:
                self._next_look = now + _SECONDS_BETWEEN_LOOKS
                self._reason = max(self._reason, self._look())
        return self._reason

    def used_up(self) -> None:
        """Removes the stop file, once the run has stopped for it, so that the next start trains."""
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be removed (%s); the next start will stop at once", self._file, error.strerror)

    def _look(self) -> Reason:
        try:
            text = self._file.read_text()
        except OSError:
            return Reason.NONE
        return Reason.REQUEUE_FILE if "requeue" in text else Reason.STOP_FILE

    def _on_signal(self, number: int, frame: Any) -> None:
        self._reason = max(self._reason, _SIGNALS[signal.Signals(number)])


def write_exit_code(folder: Path, code: int | None) -> None:
    """Leaves the code for the batch file; None: removes that of an earlier start."""
    path = folder / EXIT_CODE_FILE
    try:
        if code is None:
            path.unlink(missing_ok=True)
            return
        temporary = path.with_name(path.name + ".incomplete")
        temporary.write_text(f"{code}\n")
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error.strerror)


def read_exit_code(folder: Path) -> int:
    """The code that the run has left; 0 if it has left none."""
    try:
        return int((folder / EXIT_CODE_FILE).read_text())
    except (OSError, ValueError):
        return 0
