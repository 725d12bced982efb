"""The order in which training sees the clips: a pure function of (seed, position), so that it can resume anywhere."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence

import torch

_BLOCK = 10_000  # positions over which the shares of weighted sources are exact


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
        self._orders = _Orders(seed)

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
        return int(self._orders.get(epoch, self.num_clips)[within])


class RoundSampler(ClipSampler):
    """The first ``length`` positions of a ``ClipSampler``, again and again."""

    def __init__(self, num_clips: int, seed: int, length: int) -> None:
        super().__init__(num_clips, seed)
        self._length = length

    def _clip_at(self, position: int) -> int:
        return super()._clip_at(position % self._length)


class WeightedSampler(ClipSampler):
    """A stream in which each source has a given share, and passes through its own clips epoch after epoch.

    Every block of positions holds the sources in fixed numbers, in an order of its own; so how often a source came
    before a position needs no history.
    """

    def __init__(self, source_sizes: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Takes the number of clips of each source, in the order of the clips, and the sources' weights."""
        super().__init__(sum(source_sizes), seed)
        self._ends = list(itertools.accumulate(source_sizes))
        self._sources = [ClipSampler(size, seed + number) for number, size in enumerate(source_sizes)]
        self._quotas = _quotas(weights)
        self._deck = torch.repeat_interleave(torch.arange(len(weights)), torch.tensor(self._quotas))
        self._block, self._dealt, self._earlier = -1, self._deck, self._deck

    def _clip_at(self, position: int) -> int:
        block, within = divmod(position, _BLOCK)
        if block != self._block:
            self._dealt = self._deck[self._orders.get(block, _BLOCK)]
            one_hot = torch.nn.functional.one_hot(self._dealt, len(self._quotas))
            counts = one_hot.cumsum(0).gather(1, self._dealt[:, None]).squeeze(1)
            self._block, self._earlier = block, counts - 1
        source = int(self._dealt[within])
        own = self._sources[source].clip_indices(block * self._quotas[source] + int(self._earlier[within]), 1)[0]
        return own + (self._ends[source - 1] if source else 0)


class _Orders:
    """Permutations by (seed, number), of which the last one is kept."""

    def __init__(self, seed: int) -> None:
        self._seed, self._key = seed, (-1, -1)
        self._order = torch.empty(0, dtype=torch.int64)

    def get(self, number: int, size: int) -> torch.Tensor:
        if self._key != (number, size):
            generator = torch.Generator().manual_seed(self._seed + number)
            self._order, self._key = torch.randperm(size, generator=generator), (number, size)
        return self._order


def _quotas(weights: Sequence[float]) -> list[int]:
    """How many positions of a block each source has: in proportion, at least one, together all of them."""
    shares = [_BLOCK * weight / sum(weights) for weight in weights]
    quotas = [max(1, math.floor(share)) for share in shares]
    by_rest = sorted(range(len(shares)), key=lambda i: quotas[i] - shares[i])
    for i in itertools.islice(itertools.cycle(by_rest), max(0, _BLOCK - sum(quotas))):
        quotas[i] += 1
    while sum(quotas) > _BLOCK:  # since some have one although their share is less
        quotas[quotas.index(max(quotas))] -= 1
    return quotas
