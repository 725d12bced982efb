"""Captures CUDA graphs while other threads work on the GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PATIENCE = 60.0  # seconds a capture waits for others' work: a decoder that hangs in a driver must not stop it for ever

_changed = threading.Condition()
_capturing = False
_working = 0  # threads inside ``no_capture``


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Captures the block's work of this thread, while no other thread captures or is inside ``no_capture``.

    Args:
        graph: gets the work.
        stream: to capture on; None: torch's own for captures.
    """
    global _capturing
    with _changed:
        _changed.wait_for(lambda: not _capturing)  # torch allows one capture at a time in a process
        _capturing = True  # from now on nobody enters ``no_capture``
        _changed.wait_for(lambda: not _working, _PATIENCE)
    try:
        # thread_local: other threads, NCCL's watchdog among them, go on with their own work on the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        with _changed:
            _capturing = False
            _changed.notify_all()


@contextmanager
def no_capture() -> Iterator[None]:
    """The block's work on the GPU would break another thread's capture, as DALI's does: each waits for the other."""
    global _working
    with _changed:
        _changed.wait_for(lambda: not _capturing)
        _working += 1
    try:
        yield
    finally:
        with _changed:
            _working -= 1
            _changed.notify_all()
