"""What all ranks decide together: flags that any of them may raise, over gloo, so that no GPU waits for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from cosmos_mcore.parallel.initialize import control_group


class Exchange:
    """The largest value of each flag over all ranks: started now, read later, in between nobody waits."""

    def __init__(self, flags: Sequence[int]) -> None:
        self._flags = torch.tensor(list(flags), dtype=torch.int64)
        self._work: Any = None
        if dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, group=control_group(), async_op=True)

    def result(self) -> list[int]:
        """Waits for the slowest rank; the same on all ranks."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._flags.tolist()


def largest(*flags: int) -> list[int]:
    """The largest value of each flag over all ranks; all ranks call it."""
    return Exchange(flags).result()


def from_rank_zero(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=control_group())
    return box[0]


def gather_to_all(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks, on every rank."""
    if dist.get_world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value, group=control_group())
    return boxes


def errors_of_all(work: Callable[[], Any]) -> tuple[list[str], Any]:
    """What any rank's ``ValueError`` says, and this rank's result."""
    error, result = None, None
    try:
        result = work()
    except ValueError as mistake:
        error = str(mistake)
    return [text for text in gather_to_all(error) if text is not None], result
