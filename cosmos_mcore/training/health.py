"""Watches the numbers of the steps: not finite, or suddenly large."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable

from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_WINDOW = 100  # steps that a loss is compared with
_FEWEST = 20  # steps before anything is called a spike
_DEVIATIONS = 6.0  # mean absolute deviations above the median


class Health:
    """Counts steps that are not finite, and ends the run when there are too many in a row.

    Args:
        max_nan_iterations: how many in a row end it.
    """

    def __init__(self, max_nan_iterations: int) -> None:
        self._limit = max_nan_iterations
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row = 0
        self.nan_iterations = 0

    def check(self, iteration: int, loss: float, grad_norm: float, clips: Callable[[], str]) -> None:
        """Looks at one step; the same on all ranks.

        Args:
            iteration: of the step.
            loss: its loss.
            grad_norm: its gradient's norm; not finite: the optimizer has left the weights as they were.
            clips: names the clips that are to blame.

        Raises:
            ValueError: if too many steps in a row were not finite.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._in_a_row = 0
            self._look_for_spike(iteration, loss, clips)
            return
        self.nan_iterations += 1
        self._in_a_row += 1
        what = f"iteration {iteration}: loss {loss}, gradient norm {grad_norm}; clips: {clips()}"
        log_single_rank(
            logger, logging.WARNING, "NOT FINITE, the step was skipped (%d in a row): %s", self._in_a_row, what
        )
        if self._in_a_row >= self._limit:
            raise ValueError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is not finite; the last one was {what}. "
                "Lower optimizer.lr, or remove the clips"
            )

    def _look_for_spike(self, iteration: int, loss: float, clips: Callable[[], str]) -> None:
        if len(self._losses) >= _FEWEST:
            usual = statistics.median(self._losses)
            spread = statistics.fmean(abs(one - usual) for one in self._losses)
            if loss > usual + max(_DEVIATIONS * spread, 0.1 * usual):
                log_single_rank(
                    logger,
                    logging.WARNING,
                    "loss spike at iteration %d: %.4f, while the median of the last %d steps is %.4f; clips: %s",
                    *(iteration, loss, len(self._losses), usual, clips()),
                )
        self._losses.append(loss)
