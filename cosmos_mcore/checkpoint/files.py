"""Files that appear under their final name only when they are complete, and memory of files read through a mapping."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # downloads need no torch
    from torch import Tensor

_AHEAD = 3  # items made or being made beside the current one: their sizes differ, and no thread should wait

Item = TypeVar("Item")


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".incomplete")


@contextmanager
def new_files(paths: Sequence[Path], force: bool, stale: Sequence[Path] = ()) -> Iterator[list[Path]]:
    """Gives names to write to; moves the files to ``paths`` when all are complete and on disk.

    Args:
        paths: final names, in existing or new folders.
        force: replace existing files.
        stale: existing files that the new ones make obsolete: removed with them (and only with ``force``).

    Raises:
        ValueError: if an output exists already and ``force`` is not given, cannot be written, or is being written.
    """
    refuse_existing((*paths, *stale), force)
    temporary = [_temporary(path) for path in paths]
    ours: list[Path] = []
    with _one_line(paths[0]), ExitStack() as locks:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            for path in temporary:
                path.touch()
                _lock(path, locks)
                ours.append(path)
            yield temporary
            for path in temporary:
                flush(path)
        except BaseException:
            for path in ours:
                path.unlink(missing_ok=True)
            raise
        # From here on the temporary files stay, whatever happens: some of those that they replace may be gone.
        for path, final in zip(temporary, paths, strict=True):
            os.replace(path, final)
        for path in stale:
            if path not in paths:
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            flush(folder)


@contextmanager
def new_folder(path: Path, force: bool) -> Iterator[Path]:
    """Gives a folder to write to; moves it to ``path`` when it is complete and on disk.

    Raises:
        ValueError: if ``path`` exists already and ``force`` is not given, it cannot be written, or is being written.
    """
    refuse_existing([path], force)
    temporary, old = _temporary(path), path.with_name(path.name + ".replaced")
    with _one_line(path), ExitStack() as locks:
        if temporary.exists():
            _lock(temporary, locks)
            remove(temporary)
        temporary.mkdir(parents=True)
        _lock(temporary, locks)
        try:
            yield temporary
            for file in (*temporary.iterdir(), temporary):
                flush(file)
            if path.exists():
                remove(old)  # what a command that was killed has left; all of it is in ``path``
                os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                if old.exists():
                    os.replace(old, path)
                raise
            flush(path.parent)
            remove(old)
        finally:
            remove(temporary)


def _lock(path: Path, locks: ExitStack) -> None:
    """Keeps other commands from writing there, as long as this one lives or until ``locks`` is closed."""
    descriptor = os.open(path, os.O_RDONLY)
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another command; wait until it has ended") from None
    except OSError:
        pass  # some file systems have no locks


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def remove(path: Path) -> None:
    """Deletes a file, a link or a folder with all in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(paths: Sequence[Path], force: bool) -> None:
    """Protects existing outputs.

    Raises:
        ValueError: if one of ``paths`` exists and ``force`` is not given.
    """
    existing = next((path for path in paths if path.exists()), None)
    if existing is not None and not force:
        raise ValueError(f"{existing} exists already; give --force to replace it")


def flush(path: Path) -> None:
    """Asks the file system to put a file's bytes, or a folder's entries, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Makes the next items in a second thread while the caller uses the current one.

    Args:
        items: usually a generator; only the second thread runs it, up to three items ahead.

    Yields:
        The items, in order.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Any]] = deque(pool.submit(next, iterator, end) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item


def fetch_pages(tensor: Tensor) -> None:
    """Starts reading a tensor that is mapped from a file, in larger pieces than touching its pages would."""
    _advise(tensor, mmap.MADV_WILLNEED)


def release_pages(tensor: Tensor) -> None:
    """Gives back the memory of a tensor that is mapped from a file; reading it again reads the file again.

    Without this every byte ever read through a mapping counts as memory of the process. Changes to the tensor are lost.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def _advise(tensor: Tensor, advice: int) -> None:
    if sys.platform != "linux":
        return
    storage = tensor.untyped_storage()
    # Whole pages only: the outer ones may be shared with neighbours.
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
