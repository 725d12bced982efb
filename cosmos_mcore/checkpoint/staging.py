"""Copies of what a checkpoint holds in host memory, so that training can go on while they are written."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_ALIGNMENT = 64  # bytes


class HostCopy:
    """One block of host memory for the whole of a rank's share, kept from save to save.

    On a GPU the memory is page-locked and the copies run on a stream of their own: they take the bus's full speed, and
    the next step's forward and backward pass run meanwhile. Only what changes the weights has to wait (``fence``).
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._locked = False
        self._stream: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None
        self._fence: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    @property
    def num_bytes(self) -> int:
        """Host memory in use, in bytes."""
        return self._memory.numel()

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Gets the memory for ``copy`` ahead of it, since locking it takes seconds."""
        distinct = {_name(tensor): tensor for tensor in tensors}.values()
        total = sum(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in distinct)
        if total > self._memory.numel():
            self._allocate(total, any(tensor.is_cuda for tensor in tensors))

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Starts copying. The same memory is copied once, however often it occurs.

        The sources must stay as they are until ``wait`` has returned, or until GPU work that changes them has been put
        behind ``fence``.

        Returns:
            The copies; complete after ``wait``.
        """
        self.reserve(tensors)
        places: dict[tuple[int, int, torch.dtype], int] = {}
        sources, total = [], 0
        for tensor in tensors:
            if _name(tensor) not in places:
                places[_name(tensor)] = total
                sources.append(tensor)
                total += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT

        def copy_of(tensor: Tensor) -> Tensor:
            place = places[_name(tensor)]
            return self._memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        self._done = self._fence = None
        if any(tensor.is_cuda for tensor in tensors):
            self._copy_on_stream([(tensor, copy_of(tensor)) for tensor in sources])
        else:
            for tensor in sources:
                copy_of(tensor).copy_(tensor)
        return [copy_of(tensor) for tensor in tensors]

    def _copy_on_stream(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source, target in pairs:
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
            self._done = torch.cuda.Event()
            self._done.record(self._stream)

    def fence(self) -> None:
        """Lets GPU work that is started from now on wait for the copies; the host does not wait."""
        if self._done is not None and self._fence is None:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            torch.cuda.current_stream().wait_event(self._done)
            after.record()
            self._fence = before, after

    def fenced_seconds(self) -> float:
        """How long the GPU waited at the fence for the last copies; waits for that."""
        if self._fence is None:
            return 0.0
        before, after = self._fence
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def wait(self) -> None:
        """Waits for the copies."""
        if self._done is not None:
            self._done.synchronize()

    def _allocate(self, size: int, on_gpu: bool) -> None:
        self.release()
        self._memory = torch.empty(size, dtype=torch.uint8)
        if on_gpu:
            # torch's own page-locked memory comes in powers of two: up to twice as much.
            code = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
            self._locked = int(code) == 0
            if not self._locked:
                logger.warning("host memory cannot be page-locked (CUDA error %d): saves block for longer", int(code))
        logger.info("saving keeps %.2f GiB of host memory on this rank", size / 2**30)

    def release(self) -> None:
        """Gives the memory back; the copies must be complete."""
        if self._locked:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
            self._locked = False
        self._memory = torch.empty(0, dtype=torch.uint8)


def _name(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    """Equal for tensors of the same memory."""
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr(), tensor.numel(), tensor.dtype
