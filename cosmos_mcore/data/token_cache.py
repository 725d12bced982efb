"""Token ids on disk: what was tokenized once is never decoded again.

One folder holds the ids of clips of one kind, and says in ``token_cache.json`` of which: anything that changes ids is a
setting there. A clip is found by the content of its file and its first frame. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_mcore.config.derived import VideoLayout, run_dir, user_path
from cosmos_mcore.config.schema import DataConfig, RunConfig
from cosmos_mcore.data.contents import FileContents
from cosmos_mcore.data.shards import ClipKey, ShardReader, ShardWriter, evict

logger = logging.getLogger(__name__)

SETTINGS_FILE = "token_cache.json"
TRANSFORM_VERSION = 2  # raise it with every change of decoding or transforms that alters pixels

_SHARD_BYTES = 2**28
_REFRESH_SECONDS = 10.0  # between looks at what others have added: hundreds of processes may share a file system
_TOKENS = "tokens per clip"


def clip_settings(data: DataConfig) -> dict[str, Any]:
    """The keys of ``data`` that change a clip's ids."""
    return {f"data.{name}": getattr(data, name) for name in ("height", "width", "num_frames", "frame_stride")}


def cache_settings(config: RunConfig, layout: VideoLayout, fingerprint: str, decoder: str) -> dict[str, Any]:
    """Everything that the ids of a run depend on.

    Args:
        config: the run's.
        layout: of its clips.
        fingerprint: the tokenizer's.
        decoder: name of the decoder; two of them differ by a grey level here and there, enough for other ids.
    """
    settings = {**clip_settings(config.data), _TOKENS: math.prod(layout.latent_shape)}
    return {**settings, "tokenizer": fingerprint, "data.decoder": decoder, "transform version": TRANSFORM_VERSION}


def cache_folder(config: RunConfig, settings: Mapping[str, Any]) -> Path | None:
    """Where the run keeps ids: ``data.token_cache``, below the run's folder if that is ``auto``; None: nowhere."""
    if is_cache(config.data.path):
        return user_path(str(config.data.path))
    if config.data.token_cache != "auto":
        return None if config.data.token_cache is None else user_path(config.data.token_cache)
    kind = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    data = config.data
    return run_dir(config) / "token_cache" / f"{data.num_frames}x{data.height}x{data.width}-{kind}"


def is_cache(path: object) -> bool:
    """Whether ``data.path`` names a token cache instead of videos."""
    return isinstance(path, str) and (user_path(path) / SETTINGS_FILE).is_file()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that a cache was made with.

    Raises:
        ValueError: if they cannot be read.
    """
    try:
        return dict(json.loads((folder / SETTINGS_FILE).read_text()))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no token cache: it has no {SETTINGS_FILE}") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{folder / SETTINGS_FILE} cannot be read ({error}); delete the token cache {folder}"
        ) from None


def check_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Compares the settings of a cache with those of a run.

    Raises:
        ValueError: names the first setting that differs.
    """
    found = read_settings(folder)
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"the token cache {folder} was made with {name}={found.get(name)}, this run has {name}={value}; "
                "change that, or set data.token_cache to another folder"
            )


def cached_keys(folder: Path) -> list[ClipKey]:
    """The clips that a cache has.

    Raises:
        ValueError: if its settings cannot be read.
    """
    reader = ShardReader(folder, int(read_settings(folder)[_TOKENS]))
    reader.refresh()
    return reader.keys()


class TokenCache:
    """The ids in one folder, shared with any number of other processes; thread-safe."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], limit: float = math.inf, *, writable: bool = True):
        """Opens the cache, and makes it if it is new.

        Args:
            folder: where it lies.
            settings: of this run, as ``cache_settings`` gives them.
            limit: bytes; beyond it, what was used longest ago is deleted.
            writable: False to train from it alone: nothing is added then, and the decoder does not matter.

        Raises:
            ValueError: if it was made with other settings, or cannot be read or made.
        """
        self.folder, self._limit, self._writable = folder, limit, writable
        if writable:
            _create(folder, settings)
        check_settings(folder, {k: v for k, v in settings.items() if writable or k != "data.decoder"})
        self._num_tokens = int(settings[_TOKENS])
        self.contents = FileContents(folder)
        self._reader = ShardReader(folder, self._num_tokens)
        self._reader.refresh()
        self._refreshed = time.monotonic()
        self._writer: ShardWriter | None = None
        self._lock = threading.Lock()
        self.hits = self.added = 0

    def __len__(self) -> int:
        """Number of clips."""
        return len(self._reader)

    @property
    def takes_more(self) -> bool:
        """Whether ids can still be added: False after an error of the disk."""
        return self._writable

    def find(self, key: ClipKey) -> np.ndarray | None:
        """Ids [tokens], uint16, of a clip; None if it is not there."""
        ids = self._reader.read(key)
        if ids is None and time.monotonic() - self._refreshed > _REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            self._reader.refresh()  # another process may have done it meanwhile
            ids = self._reader.read(key)
        with self._lock:
            self.hits += ids is not None
        return ids

    def add(self, key: ClipKey, ids: np.ndarray) -> None:
        """Keeps the ids [tokens], 0..63999, of a clip; a disk that is full ends the keeping, not the run."""
        with self._lock:
            if not self._writable:
                return
            try:
                if self._writer is None:
                    self._writer = ShardWriter(self.folder, self._num_tokens)
                self._writer.append(key, ids.astype(np.uint16))
                self._reader.note(key, self._writer.path, self._writer.count - 1)
                self.added += 1
                if self._writer.size >= min(_SHARD_BYTES, self._limit / 8):
                    self._roll()
            except OSError as error:
                logger.warning("the token cache %s takes no more ids (%s)", self.folder, error)
                self._writable = False

    def close(self) -> None:
        """Closes all files."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
                self._writer = None
            self._writable = False
        self._reader.close()

    def _roll(self) -> None:
        """Starts a new pair of files, and makes room if the limit is reached."""
        assert self._writer is not None
        self._writer.close()
        self._writer = None
        evict(self.folder, self._limit)


def merge(source: Path, target: Path) -> int:
    """Copies the ids of one cache into another; files that are there already are left alone.

    Returns:
        The number of files copied.

    Raises:
        ValueError: if the two were made with different settings, or cannot be read or written.
    """
    settings = read_settings(source)
    _create(target, settings)
    check_settings(target, settings)
    copied = 0
    with writing_to(target):
        # An index comes after the records that it leads to.
        for pattern in ("files-*.jsonl", "*.ids", "*.idx"):
            for path in sorted(source.glob(pattern)):
                goal = target / path.name
                if not goal.exists() or goal.stat().st_size < path.stat().st_size:
                    with _replacing(goal) as temporary:
                        temporary.write_bytes(path.read_bytes())
                    copied += 1
    return copied


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turns an error of the disk into a ValueError that names the cache."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"the token cache {folder} cannot be written ({reason}); make room, or name another") from None


def _create(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / SETTINGS_FILE).exists():
            with _replacing(folder / SETTINGS_FILE) as temporary:
                temporary.write_text(json.dumps(dict(settings), indent=1) + "\n")
    except OSError as error:
        raise ValueError(
            f"the token cache {folder} cannot be made ({error.strerror or error}); set data.token_cache to a folder "
            "that can be written, or to null"
        ) from None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    # Not the process's number: on several nodes, and in containers above all, many have the same.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.incomplete")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
