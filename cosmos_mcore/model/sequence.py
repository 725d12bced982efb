"""Which positions of the sequence a rank holds."""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag_positions(length: int, rank: int, ranks: int) -> Tensor:
    """Positions that a context-parallel rank holds: slices ``rank`` and ``2 * ranks - 1 - rank`` of 2 * ranks.

    Both halves of a rank together cost the same under a causal mask. int64 [length / ranks].
    """
    size = length // (2 * ranks)
    return torch.cat([torch.arange(i * size, (i + 1) * size) for i in (rank, 2 * ranks - 1 - rank)])


def zigzag_slice(rows: Tensor, rank: int, ranks: int) -> Tensor:
    """``rows[zigzag_positions(len(rows), rank, ranks)]``; from slices, as an index on the host would wait for a GPU."""
    slices = rows.chunk(2 * ranks)
    return torch.cat((slices[rank], slices[2 * ranks - 1 - rank]))
