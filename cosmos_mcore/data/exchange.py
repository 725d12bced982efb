"""How the ranks of a model replica share the clips of a step: each reads some, all get the ids of all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_OK, _FAILED = 0, 1


class Exchange:
    """Deals clips out to the ranks of a replica in turn, and brings their ids together. Not thread-safe."""

    def __init__(self, group: dist.ProcessGroup | None, num_tokens: int) -> None:
        """Takes the ranks.

        Args:
            group: the replica's ranks, through gloo, used for nothing else (None: this rank alone).
            num_tokens: ids of one clip.
        """
        self.group, self._num_tokens = group, num_tokens
        self.rank, self.size = (0, 1) if group is None else (group.rank(), group.size())

    def owner(self, number: int) -> int:
        """The rank that reads the replica's clip with this number, counted since the loader's start."""
        return number % self.size

    def gather(self, first: int, count: int, mine: list[Tensor] | Exception) -> Tensor:
        """Brings the ids of one step together; all ranks call it for the same step.

        Args:
            first: number of the step's first clip.
            count: clips of the step.
            mine: ids [tokens] int32 of this rank's clips in their order, or why there are none.

        Returns:
            Ids [count, tokens], int32, on the CPU.

        Raises:
            Exception: ``mine`` if it is one; else an error that tells what has failed on another rank.
        """
        if self.size == 1:
            if isinstance(mine, Exception):
                raise mine
            return torch.stack(mine)
        rows = -(-count // self.size)
        sent = torch.zeros(rows * self._num_tokens + 1, dtype=torch.int32)
        if isinstance(mine, Exception):
            sent[-1] = _FAILED
        elif mine:
            sent[: len(mine) * self._num_tokens] = torch.cat(mine)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent, group=self.group)
        if any(part[-1] != _OK for part in received):
            self._raise(mine)
        owners = [self.owner(first + number) for number in range(count)]
        ids = [received[owner][:-1].view(rows, -1)[owners[:number].count(owner)] for number, owner in enumerate(owners)]
        return torch.stack(ids)

    def _raise(self, mine: list[Tensor] | Exception) -> None:
        """Ends all ranks alike, so that the one that speaks to the user knows the reason."""
        reason = (type(mine).__name__, str(mine)) if isinstance(mine, Exception) else None
        reasons: list[tuple[str, str] | None] = [None] * self.size
        dist.all_gather_object(reasons, reason, group=self.group)
        if isinstance(mine, Exception):
            raise mine
        rank, (kind, text) = next((rank, found) for rank, found in enumerate(reasons) if found is not None)
        if kind == "ValueError":
            raise ValueError(text)
        raise RuntimeError(f"rank {rank} of this model replica cannot read clips any more: {kind}: {text}")
