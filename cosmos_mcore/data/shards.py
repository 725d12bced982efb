"""Append-only files of token ids that many processes share, also over a network file system.

Each process appends to files of its own, so no locks are needed: ``NAME.ids`` holds records of one fixed size,
``NAME.idx`` says which clip lies where. A record goes to the first file before the second one names it, and carries its
clip and a checksum; whatever a killed process or a full disk has left half-written is never taken for ids.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np

_RECORD_HEAD = struct.Struct("<4s16sI")
_RECORD_MARK = b"ids1"
_ENTRY = struct.Struct("<16sIII")  # content, first frame, number of the record, checksum of these
_CHECKSUM = struct.Struct("<I")
_OPEN_FILES = 64
_TOUCH_SECONDS = 600.0


class ClipKey(NamedTuple):
    """Which clip: 16 bytes that identify the file's content, and the number of the first frame."""

    content: bytes
    first_frame: int


def record_bytes(num_tokens: int) -> int:
    """Size of one clip's record."""
    return _RECORD_HEAD.size + 2 * num_tokens + _CHECKSUM.size


class ShardWriter:
    """One process's current pair of files; not thread-safe.

    Attributes:
        path: the file of the records.
        count: records written.
        size: bytes written to both.
    """

    def __init__(self, folder: Path, num_tokens: int) -> None:
        """Creates the pair.

        Raises:
            OSError: if the folder cannot be written.
        """
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.path = folder / f"{name}.ids"
        self._num_tokens, self.count, self.size = num_tokens, 0, 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
        self._ids = os.open(self.path, flags, 0o644)
        self._index = os.open(self.path.with_suffix(".idx"), flags, 0o644)

    def append(self, key: ClipKey, ids: np.ndarray) -> None:
        """Writes one record; on an error the pair must not be used again.

        Raises:
            OSError: if the disk is full or the like.
        """
        assert ids.shape == (self._num_tokens,) and ids.dtype == np.uint16
        body = _RECORD_HEAD.pack(_RECORD_MARK, *key) + ids.astype("<u2").tobytes()
        _write(self._ids, body + _CHECKSUM.pack(zlib.crc32(body)))
        entry = struct.pack("<16sII", *key, self.count)
        _write(self._index, entry + _CHECKSUM.pack(zlib.crc32(entry)))
        self.count += 1
        self.size += record_bytes(self._num_tokens) + _ENTRY.size

    def close(self) -> None:
        """Ends the pair."""
        os.close(self._ids)
        os.close(self._index)


class ShardReader:
    """Finds and reads the records that all processes have written to a folder; thread-safe."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        """Reads no file yet: see ``refresh``."""
        self._folder, self._num_tokens = folder, num_tokens
        self._places: dict[ClipKey, tuple[str, int]] = {}
        self._read_to: dict[str, int] = {}  # bytes of each index that are known
        self._files: OrderedDict[str, int] = OrderedDict()  # open descriptors, least recently used first
        self._touched: dict[str, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of known clips."""
        return len(self._places)

    def keys(self) -> list[ClipKey]:
        """The known clips."""
        with self._lock:
            return list(self._places)

    def refresh(self) -> None:
        """Takes in what has been written since the last call."""
        with self._lock:
            for entry in sorted(os.scandir(self._folder), key=lambda entry: entry.name):
                if entry.name.endswith(".idx"):
                    self._read_index(entry.name)

    def note(self, key: ClipKey, path: Path, number: int) -> None:
        """Takes in a record that this process has written: the ``number``-th of ``path``."""
        with self._lock:
            self._places[key] = (path.stem, number)

    def read(self, key: ClipKey) -> np.ndarray | None:
        """Ids [tokens], uint16, of a clip; None if there is no sound record of it."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            name, number = place
            ids = self._read_record(name, number, key)
            if ids is None:
                del self._places[key]
            else:
                self._touch(name)
            return ids

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _read_index(self, name: str) -> None:
        start = self._read_to.get(name, 0)
        try:
            with open(self._folder / name, "rb") as file:
                file.seek(start)
                data = file.read()
        except FileNotFoundError:  # evicted by another process
            return
        whole = len(data) // _ENTRY.size * _ENTRY.size  # the rest is being written, or torn
        for offset in range(0, whole, _ENTRY.size):
            content, first_frame, number, checksum = _ENTRY.unpack_from(data, offset)
            if zlib.crc32(data[offset : offset + _ENTRY.size - _CHECKSUM.size]) == checksum:
                # A later record replaces one whose file may have been evicted.
                self._places[ClipKey(content, first_frame)] = (name.removesuffix(".idx"), number)
        self._read_to[name] = start + whole

    def _read_record(self, name: str, number: int, key: ClipKey) -> np.ndarray | None:
        size = record_bytes(self._num_tokens)
        try:
            data = os.pread(self._descriptor(name), size, number * size)
        except OSError:  # evicted by another process
            return None
        body = data[: -_CHECKSUM.size]
        if len(data) != size or data[-_CHECKSUM.size :] != _CHECKSUM.pack(zlib.crc32(body)):
            return None
        if _RECORD_HEAD.unpack_from(body) != (_RECORD_MARK, *key):
            return None
        return np.frombuffer(body, "<u2", offset=_RECORD_HEAD.size).astype(np.uint16)

    def _descriptor(self, name: str) -> int:
        if name not in self._files:
            self._files[name] = os.open(self._folder / f"{name}.ids", os.O_RDONLY | os.O_CLOEXEC)
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(name)
        return self._files[name]

    def _touch(self, name: str) -> None:
        """Notes the use of a pair in its time of change, for whoever evicts."""
        now = time.monotonic()
        if now - self._touched.get(name, -_TOUCH_SECONDS) >= _TOUCH_SECONDS:
            self._touched[name] = now
            with contextlib.suppress(OSError):  # a cache that may only be read, or evicted
                os.utime(self._folder / f"{name}.ids")


def evict(folder: Path, limit: float) -> int:
    """Deletes the pairs of files whose last use is longest ago until all others fit into ``limit`` bytes.

    Args:
        folder: of the pairs.
        limit: bytes.

    Returns:
        How many pairs were deleted.
    """
    pairs: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.ids"):
        try:
            status = path.stat()
            size = status.st_size + path.with_suffix(".idx").stat().st_size
        except FileNotFoundError:  # another process is at it, too
            continue
        pairs.append((status.st_mtime, size, path))
    pairs.sort()
    total, deleted = sum(size for _, size, _ in pairs), 0
    for _, size, path in pairs:
        if total <= limit:
            break
        path.with_suffix(".idx").unlink(missing_ok=True)  # first what leads to the records
        path.unlink(missing_ok=True)
        total, deleted = total - size, deleted + 1
    return deleted


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
