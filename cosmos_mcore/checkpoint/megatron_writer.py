"""Keeps Megatron-Core's synchronous saves in the calling process.

Both versions start a process that manages a queue, for asynchronous saves; it would outlive a rank that is killed, and
nothing may be left behind. Version 0.16 moreover writes each file in a process forked from the training process, whose
threads (clips being decoded, TensorBoard) may hold locks at that moment; the fork never releases them, and the save
hangs. Version 0.19 writes in threads, but warns at every save that its asynchronous saves will go.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


@contextmanager
def writing_in_this_process() -> Iterator[None]:
    """Within it, a synchronous ``dist_checkpointing.save`` starts no process and does not warn."""
    logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
    make_queue = next(
        n for n in ("get_write_results_queue", "_get_write_results_queue") if hasattr(filesystem_async, n)
    )
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(filesystem_async, make_queue, queue.Queue))
        if hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc"):
            in_process = staticmethod(_write_all)
            stack.enter_context(mock.patch.object(FileSystemWriterAsync, "write_preloaded_data_multiproc", in_process))
        yield


def _write_all(
    transforms: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Writes bucket after bucket and leaves the results as Megatron's own function does."""
    written: dict[int, Any] | Exception = {}
    for number, bucket in enumerate(write_buckets):
        local: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[Any] = queue.Queue()
        pending.put(number)
        FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, local, pending, use_fsync=True, use_msc=use_msc
        )
        _, result = local.get_nowait()
        if isinstance(result, Exception):
            written = result
            break
        assert isinstance(written, dict)
        written[number] = result
    results.put(written)
