"""How the ranks of a model replica share the clips of a step: each reads some, all get the rows of all.

A clip's row holds its ids and whatever other whole numbers the loader sends along.
"""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist
from torch import Tensor

_TEXT = 1024  # bytes for the reason of a failure in every message
_tags = itertools.count()


class Exchange:
    """Deals clips out to the ranks of a replica in turn, and brings their rows together. Not thread-safe.

    Several may use one group at the same time, each from a thread of its own: messages carry the number of the
    exchange, which is the same on all ranks as long as they make their exchanges in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None, row_length: int) -> None:
        """Takes the ranks.

        Args:
            group: the replica's ranks, through gloo (None: this rank alone).
            row_length: numbers of one clip.
        """
        self._group, self._row_length, self._tag = group, row_length, next(_tags)
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())
        self._ranks = [0] if group is None else dist.get_process_group_ranks(group)

    def owner(self, number: int) -> int:
        """The rank that reads the replica's clip with this number, counted since the loader's start."""
        return number % self.size

    def gather(self, first: int, count: int, mine: list[Tensor] | Exception) -> Tensor:
        """Brings the rows of one step together; all ranks call it for the same step.

        Args:
            first: number of the step's first clip.
            count: clips of the step.
            mine: rows [row_length] int32 of this rank's clips in their order, or why there are none.

        Returns:
            Rows [count, row_length], int32, on the CPU.

        Raises:
            Exception: ``mine`` if it is one; else an error that tells what has failed on another rank.
        """
        if self.size == 1:
            if isinstance(mine, Exception):
                raise mine
            return torch.stack(mine)
        rows = -(-count // self.size)
        text = torch.zeros(_TEXT, dtype=torch.uint8)
        ids = torch.zeros(rows * self._row_length, dtype=torch.int32)
        if isinstance(mine, Exception):
            # Cut so that no character is torn; never empty, since that means success.
            reason = f"{type(mine).__name__}: {mine}".encode()[:_TEXT].decode(errors="ignore").encode()
            text[: len(reason)] = torch.tensor(list(reason), dtype=torch.uint8)
        elif mine:
            ids[: len(mine) * self._row_length] = torch.cat(mine)
        received = self._send_to_all(torch.cat([text, ids.view(torch.uint8)]))
        self._raise_failure(received, mine)
        parts = [part[_TEXT:].clone().view(torch.int32).view(rows, -1) for part in received]
        owners = [self.owner(first + number) for number in range(count)]
        return torch.stack([parts[owner][owners[:number].count(owner)] for number, owner in enumerate(owners)])

    def _send_to_all(self, message: Tensor) -> list[Tensor]:
        """Messages of all ranks, the own one included; not by a collective, which another thread's could answer."""
        received = [message if rank == self.rank else torch.empty_like(message) for rank in range(self.size)]
        others = [rank for rank in range(self.size) if rank != self.rank]
        works = [dist.irecv(received[rank], self._ranks[rank], self._group, self._tag) for rank in others]
        works += [dist.isend(message, self._ranks[rank], self._group, self._tag) for rank in others]
        for work in works:
            assert work is not None
            work.wait()
        return received

    def _raise_failure(self, received: list[Tensor], mine: list[Tensor] | Exception) -> None:
        """Ends all ranks alike, so that the one that speaks to the user knows the reason."""
        if isinstance(mine, Exception):
            raise mine
        for rank, part in enumerate(received):
            kind, _, text = bytes(part[:_TEXT].tolist()).rstrip(b"\0").decode().partition(": ")
            if kind == "ValueError":
                raise ValueError(text)
            if kind:
                raise RuntimeError(f"rank {rank} of this model replica cannot read clips any more: {kind}: {text}")
