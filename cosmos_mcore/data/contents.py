"""What a file holds, as a hash, so that ids are found again when a file is renamed, moved or copied.

Files of up to 64 MiB are hashed whole; of larger ones, the size and 64 MiB spread evenly from start to end.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from cosmos_mcore.data.mp4 import UnreadableVideoError

_BLOCK = 2**20
_BLOCKS = 64  # of a file; a larger one is not read whole, since a film of an hour has gigabytes


class _State(NamedTuple):
    size: int
    mtime_ns: int


class FileContents:
    """Hashes files, each once: what is known lies beside the ids as JSON lines, one file per process; thread-safe."""

    def __init__(self, folder: Path) -> None:
        """Reads what all processes have noted in ``folder``, which must exist."""
        self._folder = folder
        self._known: dict[str, tuple[_State, bytes]] = {}
        self._out: Path | None = None
        self._lock = threading.Lock()
        for path in sorted(folder.glob("files-*.jsonl")):  # by time: later notes replace earlier ones
            for line in path.read_bytes().split(b"\n"):
                self._take(line)

    def of(self, path: str) -> bytes:
        """The 16 bytes that identify a file's content.

        Raises:
            UnreadableVideoError: if the file has vanished or cannot be read.
        """
        try:
            status = os.stat(path)
            state = _State(status.st_size, status.st_mtime_ns)
            name = os.path.abspath(path)
            with self._lock:
                known = self._known.get(name)
            if known is not None and known[0] == state:
                return known[1]
            content = _hash(path)
        except OSError as error:
            raise UnreadableVideoError(f"cannot be opened ({error.strerror or error})") from error
        with self._lock:
            self._known[name] = (state, content)
            self._note({"path": name, **state._asdict(), "content": content.hex()})
        return content

    def paths(self) -> dict[str, bytes]:
        """The content of every file that was ever hashed, whether it still exists or not."""
        with self._lock:
            return {path: content for path, (_, content) in self._known.items()}

    def _take(self, line: bytes) -> None:
        try:
            note = json.loads(line)
            self._known[note["path"]] = (_State(note["size"], note["mtime_ns"]), bytes.fromhex(note["content"]))
        except (ValueError, KeyError, TypeError):
            pass  # torn: the process was killed

    def _note(self, note: dict[str, Any]) -> None:
        if self._out is None:
            name = f"files-{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            self._out = self._folder / name
        try:
            with open(self._out, "ab") as file:
                file.write(json.dumps(note).encode() + b"\n")
        except OSError:
            pass  # a full disk, or a cache that may only be read: the file is hashed again next time


def _hash(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        last = max(0, size - _BLOCK)
        count = min(_BLOCKS, -(-size // _BLOCK))
        for number in range(count):
            file.seek(last * number // max(1, count - 1))
            digest.update(file.read(_BLOCK))
    return digest.digest()[:16]
