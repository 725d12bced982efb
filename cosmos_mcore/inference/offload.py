"""Parks weights in CPU memory while something else needs the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor


def tensors_of(tree: object) -> Iterator[Tensor]:
    """All tensors in dataclasses and tuples of tensors."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from tensors_of(part)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from tensors_of(getattr(tree, field.name))


class Parking:
    """Frees the memory of tensors on a GPU and brings them back; they stay the same objects.

    The copy in CPU memory is made once and pinned, so that bringing the weights back runs at the speed of the bus, with
    no file read again. Their addresses change: a CUDA graph that reads them must not outlive ``present``.

    Args:
        tree: the tensors, as ``tensors_of`` finds them; parked from now on. Each must be all of its storage.
    """

    def __init__(self, tree: object) -> None:
        self._tensors = list(tensors_of(tree))
        on_gpu = any(tensor.is_cuda for tensor in self._tensors)
        self._parked = []
        for tensor in self._tensors:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            copy = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
            self._parked.append(copy.copy_(tensor))
            tensor.untyped_storage().resize_(0)
        if on_gpu:
            torch.cuda.empty_cache()

    @contextmanager
    def present(self) -> Iterator[None]:
        """Has the tensors on their device within the block; leaves none there if there is no room for all."""
        try:
            for tensor, copy in zip(self._tensors, self._parked, strict=True):
                tensor.untyped_storage().resize_(copy.nbytes)
                tensor.copy_(copy, non_blocking=True)
            yield
        finally:
            for tensor in self._tensors:
                tensor.untyped_storage().resize_(0)
            if any(tensor.is_cuda for tensor in self._tensors):
                torch.cuda.empty_cache()
