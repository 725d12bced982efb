"""The order in which training sees the clips."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import torch


class ClipSampler:
    """An endless stream of clip numbers: each epoch holds every clip once, in an order of its own.

    The clip at a position of the stream depends on nothing but (seed, position), so training can resume anywhere and
    any split of a batch over ranks reads the same clips. The first epoch has the order of the original's
    ``DistributedSampler`` over one replica (spec/data.md section 6), which repeats it in every epoch.
    """

    def __init__(self, num_clips: int, seed: int) -> None:
        assert num_clips > 0
        self.num_clips = num_clips
        self.seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def clip_indices(self, first_sample: int, count: int) -> list[int]:
        """Clip numbers at the positions ``first_sample`` to ``first_sample + count - 1`` of the stream."""
        return [self._clip_at(position) for position in range(first_sample, first_sample + count)]

    def replacements(self, position: int) -> Iterator[int]:
        """Clip numbers to try, in this order, where the clip at ``position`` cannot be read; each clip once."""
        draw = random.Random(f"{self.seed}/{position}")
        step = draw.randrange(1, self.num_clips + 1)
        while math.gcd(step, self.num_clips) > 1:
            step = draw.randrange(1, self.num_clips + 1)
        start = draw.randrange(self.num_clips)
        return ((start + i * step) % self.num_clips for i in range(self.num_clips))

    def _clip_at(self, position: int) -> int:
        epoch, within = divmod(position, self.num_clips)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order = torch.randperm(self.num_clips, generator=generator)
            self._epoch = epoch
        return int(self._order[within])
