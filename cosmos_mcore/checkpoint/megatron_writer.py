"""Keeps Megatron-Core 0.16's synchronous saves in the calling process, and 0.19's from warning.

Version 0.16 writes each file of a synchronous save in a process forked from the training process. Its threads (clips
being decoded, TensorBoard) may hold locks at that moment, which the fork never releases, and the save hangs. Version
0.19 writes in threads, but warns at every save, synchronous ones too, that its asynchronous saves will go.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


@contextmanager
def writing_in_this_process() -> Iterator[None]:
    """Within it, a synchronous ``dist_checkpointing.save`` forks nothing and does not warn."""
    logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
    if not hasattr(FileSystemWriterAsync, "write_preloaded_data_multiproc"):
        yield
        return
    with (
        mock.patch.object(FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(_write_all)),
        mock.patch.object(filesystem_async, "_get_write_results_queue", queue.Queue),
    ):
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
