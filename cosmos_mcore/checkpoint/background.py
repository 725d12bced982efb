"""Writes checkpoints while training goes on.

A save has two parts. All ranks copy their share to host memory; that is all that training waits for. Threads then write
it, and rank 0 completes the checkpoint when every rank has written. Threads, not processes: nothing is forked from a
process with threads, and nothing outlives a rank that is killed. They spend their time in ``zlib.crc32`` and ``write``,
which let other threads run.

The order of the last steps is what makes an interruption harmless: data, folder, final name, ``latest_checkpoint.txt``,
and only then are older checkpoints removed.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cosmos_mcore.checkpoint.distributed_reader import METADATA
from cosmos_mcore.checkpoint.files import flush, remove
from cosmos_mcore.checkpoint.megatron_plan import Plan
from cosmos_mcore.checkpoint.pieces import Box, stored_values
from cosmos_mcore.checkpoint.pointer import checkpoint_name, latest_checkpoint, write_latest
from cosmos_mcore.checkpoint.staging import HostCopy
from cosmos_mcore.checkpoint.torch_file import TorchFileWriter
from cosmos_mcore.parallel.agreement import from_rank_zero, gather_to_all

logger = logging.getLogger(__name__)

_MAX_THREADS = 8


@dataclass
class SaveResult:
    """How a save ended; the same on all ranks.

    Attributes:
        iteration: of the checkpoint.
        path: its folder.
        errors: one line per rank that failed; empty if all is done.
        complete: whether the checkpoint is complete on disk, although what comes after it may have failed.
        blocked_seconds: time that training stood still for it, on this rank: its host, and its GPU for the copies.
        total_seconds: from its start until it was complete on disk.
        num_bytes: written by all ranks.
        host_bytes: host memory that this rank keeps for saves.
    """

    iteration: int
    path: Path
    errors: list[str]
    complete: bool = False
    blocked_seconds: float = 0.0
    total_seconds: float = 0.0
    num_bytes: int = 0
    host_bytes: int = 0


@dataclass
class _Written:
    """Where one box or object lies. ``box`` is None where Megatron's own list has it already."""

    index: MetadataIndex
    info: _StorageInfo
    box: tuple[tuple[int, ...], tuple[int, ...], torch.dtype] | None = None  # size of the whole, shape, dtype


class BackgroundSave:
    """Saves of one run, one at a time. Every method that is marked so is called by all ranks together.

    Args:
        folder: of the run's checkpoints.
        after: what rank 0 still does in the background once a checkpoint is complete, given its path.
    """

    def __init__(self, folder: Path, after: Callable[[Path], None] | None = None) -> None:
        self.folder, self._after = folder, after
        self._host = HostCopy()
        self._thread: threading.Thread | None = None
        self._outcome: Any = None  # of the thread: what it returned, or the error
        self._committing = False
        self._result: SaveResult | None = None
        self._plan: Plan | None = None
        self._started = 0.0

    @property
    def busy(self) -> bool:
        """Whether a save is under way; the same on all ranks."""
        return self._result is not None

    def part_done(self) -> bool:
        """Whether this rank would not have to wait in ``advance``."""
        return self._thread is None or not self._thread.is_alive()

    def fence(self) -> None:
        """To be called before GPU work that changes weights or optimizer state."""
        self._host.fence()

    def prepare(self, plan: Plan, added: Sequence[Box]) -> None:
        """Gets the host memory for saves of the same size as this plan."""
        self._host.reserve(_tensors([*plan.boxes, *added]))

    def start(self, iteration: int, plan: Callable[[], tuple[Plan, list[Box]]]) -> SaveResult | None:
        """Copies this rank's share and starts writing. All ranks.

        Args:
            iteration: optimizer steps done.
            plan: makes the plan, and the boxes that Megatron's list lacks; called on all ranks or on none.

        Returns:
            None, or how the save ended if it did not begin: it failed, or the checkpoint is there already.
        """
        assert not self.busy, "the save before has not ended"
        self._started = time.perf_counter()
        final = self.folder / checkpoint_name(iteration)
        result = SaveResult(iteration, final, [])
        error = from_rank_zero(self._prepare(final) if dist.get_rank() == 0 else None)
        if error is not None:
            result.errors = [error] if error else []
            return result
        self._plan, added = plan()
        megatrons = len(self._plan.boxes)
        boxes = [*self._plan.boxes, *added]
        copies = iter(self._host.copy(_tensors(boxes)))
        boxes = [replace(box, data=next(copies)) for box in boxes]
        boxes = [box if box.lower is None else replace(box, lower=next(copies)) for box in boxes]
        share = _Share(_partial(final), boxes, self._plan.objects, megatrons)
        self._result, self._committing = result, False
        self._run(lambda: self._write(share))
        result.blocked_seconds = time.perf_counter() - self._started
        result.host_bytes = self._host.num_bytes
        return None

    def advance(self) -> SaveResult | None:
        """Goes on to the next stage when all ranks are done with this one; waits if they are not. All ranks.

        Returns:
            How the save ended, once it has.
        """
        assert self._result is not None and self._thread is not None
        began = time.perf_counter()
        self._thread.join()
        outcome, result = self._outcome, self._result
        if not self._committing:
            parts = gather_to_all(outcome)
            result.errors = [part for part in parts if isinstance(part, str)]
            if not result.errors:
                result.num_bytes = sum(written.info.length for part in parts for written in part)
                self._committing = True
                self._run(lambda: self._commit(parts) if dist.get_rank() == 0 else None)
                result.blocked_seconds += time.perf_counter() - began
                return None
        else:
            error, result.complete = from_rank_zero((outcome, result.complete))
            result.errors = [error] if error else []
        self._thread, self._plan, self._result = None, None, None
        result.total_seconds = time.perf_counter() - self._started
        result.blocked_seconds += time.perf_counter() - began + self._host.fenced_seconds()
        return result

    def wait(self) -> SaveResult | None:
        """Waits until the save under way has ended. All ranks.

        Returns:
            How it ended; None if there was none.
        """
        result = None
        while self.busy:
            result = self.advance()
        return result

    def close(self) -> None:
        """Gives the host memory back; no save may be under way."""
        assert not self.busy
        self._host.release()

    def _prepare(self, final: Path) -> str | None:
        """Makes the folder to write to. Returns an error, "" if there is nothing to do, None to go on."""
        try:
            if _named_by_latest(final):
                return ""
            self.folder.mkdir(parents=True, exist_ok=True)
            for stale in self.folder.glob("iter_*.incomplete"):
                remove(stale)
            _partial(final).mkdir()
        except OSError as error:
            return _sentence(error)
        return None

    def _run(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self._outcome = work()
            except BaseException as error:
                logger.debug("writing a checkpoint failed", exc_info=True)
                self._outcome = _sentence(error)

        self._outcome = None
        self._thread = threading.Thread(target=run, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, share: _Share) -> list[_Written]:
        self._host.wait()
        return share.write()

    def _commit(self, parts: Sequence[Sequence[_Written]]) -> None:
        assert self._plan is not None and self._plan.metadata is not None and self._plan.config is not None
        assert self._result is not None
        final = self._result.path
        partial = _partial(final)
        metadata = _complete(self._plan.metadata, parts)
        files = {
            METADATA: pickle.dumps(metadata),
            **self._plan.files,
            "metadata.json": json.dumps(asdict(self._plan.config)).encode(),
        }
        for name, content in files.items():
            _write_file(partial / name, content)
        flush(partial)
        aside = final.with_name(final.name + ".replaced")
        if final.exists():
            remove(aside)
            os.replace(final, aside)
        os.replace(partial, final)
        flush(self.folder)
        write_latest(self.folder, final.name)
        self._result.complete = True
        remove(aside)
        if self._after is not None:
            self._after(final)


class _Share:
    """What one rank writes: boxes and objects, spread over a few files that are written at the same time."""

    def __init__(
        self,
        folder: Path,
        boxes: Sequence[Box],
        objects: Sequence[tuple[MetadataIndex, bytes]],
        megatrons: int,
    ) -> None:
        self._folder = folder
        sizes = [box.data.numel() * box.dtype.itemsize for box in boxes]
        count = min(_num_threads(), max(1, sum(sizes) >> 26))
        self._files: list[list[tuple[Box | MetadataIndex, bytes, bool]]] = [[] for _ in range(count)]
        loads = [0] * count
        for i in sorted(range(len(boxes)), key=lambda i: -sizes[i]):
            smallest = loads.index(min(loads))
            self._files[smallest].append((boxes[i], b"", i >= megatrons))
            loads[smallest] += sizes[i]
        self._files[0] += [(index, content, False) for index, content in objects]
        self._errors: queue.Queue[BaseException] = queue.Queue()

    def write(self) -> list[_Written]:
        """Writes all files and puts them on disk.

        Raises:
            OSError: if one cannot be written.
        """
        written: list[list[_Written]] = [[] for _ in self._files]

        def run(number: int) -> None:
            try:
                written[number] = self._write_file(number)
            except BaseException as error:
                self._errors.put(error)

        others = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(1, len(self._files))]
        for thread in others:
            thread.start()
        run(0)
        for thread in others:
            thread.join()
        if not self._errors.empty():
            raise self._errors.get()
        flush(self._folder)
        return [item for part in written for item in part]

    def _write_file(self, number: int) -> list[_Written]:
        name, written = f"__{dist.get_rank()}_{number}.distcp", []
        with open(self._folder / name, "wb") as file:
            for what, content, added in self._files[number]:
                start = file.tell()
                if isinstance(what, Box):
                    tensor = stored_values(what.data, what.lower, what.dtype).view(what.shape)
                    with TorchFileWriter.inside(file, tensor) as archive:
                        archive.write(tensor)
                    index = MetadataIndex(what.key, what.offsets)
                    box = (what.size, what.shape, what.dtype) if added else None
                else:
                    file.write(content)
                    index, box = what, None
                written.append(_Written(index, _StorageInfo(name, start, file.tell() - start), box))
            file.flush()
            os.fsync(file.fileno())
        return written


def _tensors(boxes: Sequence[Box]) -> list[Tensor]:
    """What has to be copied: the boxes' values, then the lower halves of those that have some."""
    return [box.data.contiguous() for box in boxes] + [box.lower for box in boxes if box.lower is not None]


def _num_threads() -> int:
    """Threads that write: more do not help a disk, and training needs cores too."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // (2 * processes)))


def _complete(metadata: Metadata, parts: Sequence[Sequence[_Written]]) -> Metadata:
    """Adds to Megatron's list what it lacks, and where everything lies."""
    metadata.version = CURRENT_DCP_VERSION
    metadata.storage_data = {}
    for part in parts:
        for written in part:
            metadata.storage_data[written.index] = written.info
            if written.box is not None:
                size, shape, dtype = written.box
                stored = metadata.state_dict_metadata.setdefault(
                    written.index.fqn, TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(size), [])
                )
                assert isinstance(stored, TensorStorageMetadata) and written.index.offset is not None
                stored.chunks.append(ChunkStorageMetadata(torch.Size(written.index.offset), torch.Size(shape)))
    return metadata


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".incomplete")


def _named_by_latest(final: Path) -> bool:
    try:
        return latest_checkpoint(final.parent) == final
    except ValueError:
        return False  # it names one that is not there


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"rank {dist.get_rank()}: {error.strerror}{where}"
    first = str(error).strip().splitlines()
    return f"rank {dist.get_rank()}: {type(error).__name__}" + (f": {first[0]}" if first else "")
