"""What a rank contributes to a checkpoint: boxes of tensors and small objects, and where they lie in the whole.

Megatron's ``fully_reshardable`` optimizer state is the only one that every layout can load. Megatron makes it by
gathering the whole state on every data-parallel rank, in host memory, several times over, while training waits. The
same tensors can be stored as what each rank has: a flat range of a parameter is at most a few boxes of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor


@dataclass
class Box:
    """A rectangular part of a stored tensor.

    Attributes:
        key: name of the whole tensor.
        size: shape of the whole tensor.
        offsets: where the part begins in it.
        shape: shape of the part.
        data: its values, of any shape with as many elements, on any device, in the dtype they are kept in.
        dtype: the dtype they are stored in.
        lower: where float32 values are kept in two halves: int16 remainders of ``data``, which is bf16 then.
    """

    key: str
    size: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    data: Tensor
    dtype: torch.dtype
    lower: Tensor | None = None


def stored_values(data: Tensor, lower: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values of a box in the dtype that they are stored in."""
    if lower is None:
        return data.to(dtype)
    return ((data.view(torch.int16).to(torch.int32) << 16) + lower.to(torch.int32)).view(torch.float32)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cuts the elements ``start`` to ``stop`` - 1 of a row-major tensor into boxes, in their order.

    Yields:
        Offsets and shape of each box; its elements follow each other in memory.
    """
    if start >= stop:
        return
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = math.prod(shape[1:])
    first, head = divmod(start, row)
    last, tail = divmod(stop, row)
    if first == last:
        yield from _within_row(shape, first, head, tail)
        return
    if head:
        yield from _within_row(shape, first, head, row)
        first += 1
    if last > first:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if tail:
        yield from _within_row(shape, last, 0, tail)


def _within_row(
    shape: Sequence[int], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, box in boxes_of_range(shape[1:], start, stop):
        yield (row, *offsets), (1, *box)


def distributed_optimizers(optimizer: MegatronOptimizer) -> list[DistributedOptimizer]:
    """The optimizers within ``optimizer`` that spread their state over data-parallel ranks."""
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in inner if isinstance(one, DistributedOptimizer)]


def optimizer_boxes(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Iterator[Box]:
    """This rank's part of the state in the ``fully_reshardable`` format; nothing is copied or communicated.

    Args:
        optimizer: one of ``distributed_optimizers``.
        model_state: the model's sharded state dict, which says where each parameter lies in the whole.
    """
    placed = {
        id(entry.data): entry
        for entry in nested_values(model_state)
        if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    }
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    entry = placed[id(parameter)]
                    if any(entry.replica_id[:-1]):
                        continue  # another rank of the replica has the same values; the last number counts replicas
                    owned = ranges["param"]
                    for name, state, lower in _states(optimizer, parameter):
                        prefix = f"optimizer.state.{name}."
                        yield from _boxes_of_state(entry, prefix, state, lower, owned.start, owned.end)


def _states(optimizer: DistributedOptimizer, parameter: Tensor) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Megatron's name, values and lower halves of each state, as they are held: joined, they would not fit a GPU."""
    group, order = optimizer.model_param_group_index_map[parameter]
    owned = optimizer.optimizer.param_groups[group]["params"][order]
    for name, state in optimizer.optimizer.state[owned].items():
        if name != "master_param":
            yield name, state.detach(), None
        elif state.dtype is torch.int16:
            yield "param", owned.detach(), state
        else:
            yield "param", state.detach(), None


def _boxes_of_state(
    entry: Any, prefix: str, state: Tensor, lower: Tensor | None, start: int, stop: int
) -> Iterator[Box]:
    """Boxes of the elements ``start`` to ``stop`` - 1 of a parameter, whose values ``state`` holds."""
    parameter, flat = entry.data, state.view(-1)
    assert flat.numel() == stop - start, (entry.key, flat.shape, start, stop)
    parts = nested_values(entry.build()) if isinstance(entry, ShardedTensorFactory) else [entry]
    for part in parts:
        begin = part.data.storage_offset() - parameter.storage_offset()
        end = begin + part.data.numel()
        assert part.data.is_contiguous(), f"{part.key} is cut across its rows"
        within = max(start, begin), min(stop, end)
        position = within[0]
        for offsets, shape in boxes_of_range(part.data.shape, within[0] - begin, within[1] - begin):
            count = math.prod(shape)
            prepended = part.prepend_axis_num
            place = part.global_offset
            yield Box(
                key=prefix + part.key,
                size=tuple(part.global_shape),
                offsets=(*place[:prepended], *(a + b for a, b in zip(place[prepended:], offsets, strict=True))),
                shape=(*(1 for _ in range(prepended)), *shape),
                data=flat[position - start : position - start + count],
                dtype=torch.float32 if lower is not None else state.dtype,
                lower=None if lower is None else lower.view(-1)[position - start : position - start + count],
            )
            position += count
