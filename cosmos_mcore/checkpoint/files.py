"""Files that appear under their final name only when they are complete, and memory of files read through a mapping."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4


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
        ValueError: if an output exists already and ``force`` is not given.
    """
    refuse_existing((*paths, *stale), force)
    temporary = [_temporary(path) for path in paths]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        for path in temporary:
            flush(path)
        for path, final in zip(temporary, paths, strict=True):
            os.replace(path, final)
        for path in stale:
            if path not in paths:
                path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            flush(folder)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, force: bool) -> Iterator[Path]:
    """Gives a folder to write to; moves it to ``path`` when it is complete and on disk.

    Raises:
        ValueError: if ``path`` exists already and ``force`` is not given.
    """
    refuse_existing([path], force)
    temporary, old = _temporary(path), path.with_name(path.name + ".replaced")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in (*temporary.iterdir(), temporary):
            flush(file)
        if path.exists():
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


def remove(path: Path) -> None:
    """Deletes a file or a folder with all in it, if it is there."""
    if path.is_dir():
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


def release_pages(tensor: Tensor) -> None:
    """Gives back the memory of a tensor that is mapped from a file; reading it again reads the file again.

    Without this every byte ever read through a mapping counts as memory of the process. The tensor must come from a
    read-only use of a file mapping: changes to it would be lost.
    """
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED)
