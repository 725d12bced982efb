"""The clips that a set of MP4 files holds (spec/data.md section 2).

Imports no torch, so a wrong path is reported at once.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.mp4 import Mp4File, UnreadableVideoError

_PROBE_THREADS = 32


@dataclass(frozen=True)
class Clip:
    """``num_frames`` frames of one file, every ``stride``-th from ``first_frame`` on."""

    path: str
    first_frame: int
    stride: int
    num_frames: int

    @property
    def frame_numbers(self) -> range:
        """The frames' numbers in the file."""
        return range(self.first_frame, self.first_frame + self.stride * self.num_frames, self.stride)


@dataclass(frozen=True)
class SkippedFile:
    """A file that is not used, and why."""

    path: str
    reason: str


class Clips(Sequence[Clip]):
    """All clips of the usable files, by file and first frame; each made when asked for, as there may be millions."""

    def __init__(self, files: Sequence[tuple[str, int]], config: DataConfig) -> None:
        """Takes (path, number of clips) of each file."""
        self._paths = [path for path, _ in files]
        self._ends = list(itertools.accumulate(count for _, count in files))
        self._interval, self._stride, self._num_frames = (
            config.start_frame_interval,
            config.frame_stride,
            config.num_frames,
        )

    def __len__(self) -> int:
        """Number of clips of all files."""
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, number: int) -> Clip: ...
    @overload
    def __getitem__(self, number: slice) -> list[Clip]: ...
    def __getitem__(self, number: int | slice) -> Clip | list[Clip]:
        """The clip with this number, or the clips of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"clip {number} of {len(self)}")
        file = bisect.bisect_right(self._ends, number)
        within = number - (self._ends[file - 1] if file else 0)
        return Clip(self._paths[file], within * self._interval, self._stride, self._num_frames)


@dataclass(frozen=True)
class ClipIndex:
    """What ``index_clips`` found: at least one clip, and the files that cannot be used."""

    clips: Sequence[Clip]
    skipped: list[SkippedFile]


def index_clips(config: DataConfig) -> ClipIndex:
    """Finds the MP4 files under ``config.path`` and the clips in them.

    Folders are searched recursively, and the file extension may be in capitals, too (the original does neither).
    Hidden files and folders are left out: they are half-written, or not meant to be data. The order is by path below
    each given folder, so it is the same on every machine. A file counts as usable if it has enough frames and its
    first one can be decoded.

    Args:
        config: read are ``path``, ``num_frames``, ``frame_stride`` and ``start_frame_interval``.

    Raises:
        ValueError: if a path does not exist, there is no MP4 file, or none of them is usable.
    """
    paths = find_files(config)
    with ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="index") as pool:
        results = list(pool.map(lambda path: _count_clips(path, config), paths))
    skipped = [result for result in results if isinstance(result, SkippedFile)]
    files = [(path, result) for path, result in zip(paths, results, strict=True) if isinstance(result, int)]
    if not files:
        raise ValueError(
            f"data.path={_shown(config)}: none of the {len(paths)} MP4 files is usable; "
            f"the first, {skipped[0].path}, {skipped[0].reason}"
        )
    return ClipIndex(Clips(files, config), skipped)


def _count_clips(path: str, config: DataConfig) -> int | SkippedFile:
    span = (config.num_frames - 1) * config.frame_stride + 1
    try:
        with Mp4File(path) as file:
            if file.num_frames < span:
                return SkippedFile(path, f"has {file.num_frames} frames, a clip needs {span}")
            file.read([0])
            return (file.num_frames - span) // config.start_frame_interval + 1
    except UnreadableVideoError as error:
        return SkippedFile(path, str(error))


def find_files(config: DataConfig) -> list[str]:
    """Finds the MP4 files under ``config.path`` without opening them; their paths, in the order of ``index_clips``.

    Raises:
        ValueError: if a path does not exist or cannot be read, or there is no MP4 file.
    """
    roots = [config.path] if isinstance(config.path, str) else list(config.path)
    paths: list[str] = []
    for root in map(Path, roots):
        root = root.expanduser()
        if root.is_dir():
            paths += sorted(_walk(root), key=lambda path: os.path.relpath(path, root))
        elif not root.exists():
            raise ValueError(
                f"data.path={root} does not exist ({root.absolute()}); set data.path to a folder with MP4 files"
            )
        elif not _is_mp4(root.name):
            raise ValueError(f"data.path={root} is not an MP4 file; set data.path to a folder with MP4 files")
        else:
            paths.append(str(root))
    if not paths:
        raise ValueError(f"data.path={_shown(config)} holds no .mp4 file, searched recursively; put MP4 files there")
    return list(dict.fromkeys(paths))  # a file may be named twice in a list, alone and within its folder


def _walk(root: Path) -> Iterator[str]:
    """MP4 files at any depth; links to folders are followed, each folder once."""
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        # Sorted, since which of two links to one folder counts must not depend on the file system.
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in names:
            path = os.path.join(folder, name)
            if _is_mp4(name) and not name.startswith(".") and not _is_special(path):
                yield path


def _refuse(error: OSError) -> None:
    raise ValueError(f"data.path: the folder {error.filename} cannot be read ({error.strerror})") from error


def _is_mp4(name: str) -> bool:
    return name.lower().endswith(".mp4")


def _is_special(path: str) -> bool:
    """Whether this is neither a file nor a dangling link: reading from a pipe would hang."""
    return os.path.exists(path) and not os.path.isfile(path)


def _shown(config: DataConfig) -> str:
    return config.path if isinstance(config.path, str) else ", ".join(config.path)
