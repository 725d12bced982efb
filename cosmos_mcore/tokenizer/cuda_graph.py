"""Captures CUDA graphs while other threads work on the GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CAPTURING = threading.Lock()  # torch allows one capture at a time in a process


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Captures the block's work of this thread; waits while another thread captures.

    Args:
        graph: gets the work.
        stream: to capture on; None: torch's own for captures.
    """
    # thread_local: other threads, NCCL's watchdog among them, go on with their own work on the GPU meanwhile.
    with _CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        yield
