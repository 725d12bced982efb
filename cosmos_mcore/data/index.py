"""The clips that a set of MP4 files holds, and with clips of one frame, of images (spec/data.md section 2).

Imports no torch, so a wrong path is reported at once.
"""

from __future__ import annotations

import bisect
import itertools
import os
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from cosmos_mcore.config.derived import user_path
from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.contents import FileContents
from cosmos_mcore.data.images import check_image, is_image
from cosmos_mcore.data.mp4 import Mp4File, UnreadableVideoError
from cosmos_mcore.data.token_cache import cached_keys, check_settings, clip_settings, is_cache
from cosmos_mcore.text.prompts import Prompts, find_prompts

_PROBE_THREADS = 32
_NO_TEXT = Prompts({}, {})


@dataclass(frozen=True)
class Clip:
    """``num_frames`` frames of one file, every ``stride``-th from ``first_frame`` on."""

    path: str
    first_frame: int
    stride: int
    num_frames: int
    content: bytes | None = None  # of the file, where only its ids are at hand: see data/token_cache.py
    prompt: str | None = None  # of the file, if there is a model that reads it

    @property
    def frame_numbers(self) -> range:
        """The frames' numbers in the file."""
        return range(self.first_frame, self.first_frame + self.stride * self.num_frames, self.stride)


@dataclass(frozen=True)
class SkippedFile:
    """A file that is not used, and why."""

    path: str
    reason: str


class _ClipsOfFiles(Sequence[Clip]):
    """Clips by file and place in it, each made when asked for, as there may be millions; ``_ends`` counts them up."""

    _ends: list[int]

    @abstractmethod
    def _clip(self, file: int, within: int) -> Clip:
        """One clip of a file."""

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
        return self._clip(*_locate(self._ends, number))


class Clips(_ClipsOfFiles):
    """All clips of the usable files, by file and first frame."""

    def __init__(
        self, files: Sequence[tuple[str, int]], config: DataConfig, prompts: Mapping[str, str] | None = None
    ) -> None:
        """Takes (path, number of clips) of each file, and the prompts by path."""
        self._paths = [path for path, _ in files]
        self._prompts = prompts or {}
        self._ends = list(itertools.accumulate(count for _, count in files))
        self._interval, self._stride, self._num_frames = (
            config.start_frame_interval,
            config.frame_stride,
            config.num_frames,
        )

    def _clip(self, file: int, within: int) -> Clip:
        path = self._paths[file]
        return Clip(path, within * self._interval, self._stride, self._num_frames, prompt=self._prompts.get(path))


class CachedClips(_ClipsOfFiles):
    """The clips whose ids a token cache has, by file and first frame.

    Attributes:
        paths: of the files.
        skipped: the files left out since they have no prompt.
    """

    def __init__(self, folder: Path, config: DataConfig, text: bool = False) -> None:
        """Reads what the cache has; ``text`` as in ``index_clips``.

        Raises:
            ValueError: if it was made with other settings, or has no clip for these, or no prompt is found.
        """
        check_settings(folder, clip_settings(config))
        self._stride, self._num_frames = config.frame_stride, config.num_frames
        firsts: dict[bytes, list[int]] = {}
        for key in sorted(cached_keys(folder)):
            if key.first_frame % config.start_frame_interval == 0:
                firsts.setdefault(key.content, []).append(key.first_frame)
        contents = sorted(FileContents(folder).paths().items())
        files = [(path, content) for path, content in contents if content in firsts]
        if not files:
            raise ValueError(f"data.path={folder}: this token cache is empty; fill it: scripts/tokenize_videos.py")
        prompts = find_prompts([path for path, _ in files], config.prompts) if text else _NO_TEXT
        self.skipped = [SkippedFile(path, reason) for path, reason in prompts.missing.items()]
        self._prompts = prompts.by_path
        self._files = [(path, content) for path, content in files if path not in prompts.missing]
        self.paths = [path for path, _ in self._files]
        self._firsts = {content: array("I", numbers) for content, numbers in firsts.items()}
        self._ends = list(itertools.accumulate(len(self._firsts[content]) for _, content in self._files))

    def _clip(self, file: int, within: int) -> Clip:
        path, content = self._files[file]
        first = self._firsts[content][within]
        return Clip(path, first, self._stride, self._num_frames, content, self._prompts.get(path))


def _locate(ends: list[int], number: int) -> tuple[int, int]:
    """The file that a clip lies in, and its number within the file."""
    size = ends[-1] if ends else 0
    if not -size <= number < size:
        raise IndexError(f"clip {number} of {size}")
    number %= size
    file = bisect.bisect_right(ends, number)
    return file, number - (ends[file - 1] if file else 0)


@dataclass(frozen=True)
class ClipIndex:
    """What ``index_clips`` found: at least one clip, and the files that cannot be used.

    Attributes:
        clips: all clips.
        skipped: the files without any.
        source_sizes: with ``data.weights``, how many clips come from each entry of ``data.path``, in their order.
    """

    clips: Sequence[Clip]
    skipped: list[SkippedFile]
    source_sizes: list[int] | None = None


def index_clips(config: DataConfig, text: bool = False) -> ClipIndex:
    """Finds the MP4 files under ``config.path`` and the clips in them.

    Folders are searched recursively, and the file extension may be in capitals, too (the original does neither).
    Hidden files and folders are left out: they are half-written, or not meant to be data. The order is by path below
    each given folder, so it is the same on every machine. A file counts as usable if it has enough frames and its
    first one can be decoded. With ``num_frames`` 1, an image is a file with one clip.

    Args:
        config: read are ``path``, ``weights``, ``num_frames``, ``frame_stride``, ``start_frame_interval`` and
            ``prompts``; where the path is a token cache, the clips are those that it has, in the order of their files'
            paths.
        text: whether the clips need prompts; a file without one is not usable then.

    Raises:
        ValueError: if a path does not exist, there is no MP4 file, or none of them is usable.
    """
    if is_cache(config.path):
        clips = CachedClips(user_path(str(config.path)), config, text)
        return ClipIndex(clips, clips.skipped)
    groups = _find_groups(config)
    paths = [path for group in groups for path in group]
    prompts = find_prompts(paths, config.prompts) if text else _NO_TEXT
    with ThreadPoolExecutor(_PROBE_THREADS, thread_name_prefix="index") as pool:
        results = list(pool.map(lambda path: _count_clips(path, config, prompts.missing), paths))
    skipped = [result for result in results if isinstance(result, SkippedFile)]
    files = [(path, result) for path, result in zip(paths, results, strict=True) if isinstance(result, int)]
    if not files:
        raise ValueError(
            f"data.path={_shown(config)}: none of the {len(paths)} MP4 files is usable; "
            f"the first, {skipped[0].path}, {skipped[0].reason}"
        )
    if config.weights is None:
        return ClipIndex(Clips(files, config, prompts.by_path), skipped)
    counts = dict(files)
    sizes = [sum(counts.get(path, 0) for path in group) for group in groups]
    if 0 in sizes:
        raise ValueError(f"data.path: {config.path[sizes.index(0)]} has a weight but no usable clip; leave both out")
    return ClipIndex(Clips(files, config, prompts.by_path), skipped, sizes)


def _count_clips(path: str, config: DataConfig, no_prompt: Mapping[str, str]) -> int | SkippedFile:
    if path in no_prompt:
        return SkippedFile(path, no_prompt[path])
    span = (config.num_frames - 1) * config.frame_stride + 1
    try:
        if is_image(path):
            check_image(path)
            return 1
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
    return [path for group in _find_groups(config) for path in group]


def prompts_of(config: DataConfig) -> Prompts:
    """The prompts of all videos that ``config.path`` names, without opening these.

    Raises:
        ValueError: as ``find_files``, and if no video has a prompt.
    """
    cached = is_cache(config.path)
    paths = CachedClips(user_path(str(config.path)), config).paths if cached else find_files(config)
    return find_prompts(paths, config.prompts)


def _find_groups(config: DataConfig) -> list[list[str]]:
    """The files under each entry of ``config.path``; one that several entries hold counts for the first of them."""
    roots = [config.path] if isinstance(config.path, str) else list(config.path)
    groups: list[list[str]] = []
    seen: set[str] = set()
    for root in map(user_path, roots):
        if root.is_dir():
            paths = sorted(_walk(root, config), key=lambda path: os.path.relpath(path, root))
            if not paths and is_cache(str(root)):
                raise ValueError(f"data.path: {root} is a token cache, which cannot be one of several entries")
            if not paths:
                raise ValueError(f"data.path={root} holds no .mp4 file, searched recursively; put MP4 files there")
        elif not root.exists():
            raise ValueError(
                f"data.path={root} does not exist ({root.absolute()}); set data.path to a folder with MP4 files"
            )
        elif not _is_usable(root.name, config):
            raise ValueError(f"data.path={root} is not an MP4 file; set data.path to a folder with MP4 files")
        else:
            paths = [str(root)]
        groups.append([path for path in paths if path not in seen])  # maybe named alone and within its folder
        seen.update(paths)
    return groups


def _walk(root: Path, config: DataConfig) -> Iterator[str]:
    """Usable files at any depth; links to folders are followed, each folder once."""
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
            if _is_usable(name, config) and not name.startswith(".") and not _is_special(path):
                yield path


def _refuse(error: OSError) -> None:
    raise ValueError(f"data.path: the folder {error.filename} cannot be read ({error.strerror})") from error


def _is_usable(name: str, config: DataConfig) -> bool:
    return name.lower().endswith(".mp4") or (config.num_frames == 1 and is_image(name))


def _is_special(path: str) -> bool:
    """Whether this is neither a file nor a dangling link: reading from a pipe would hang."""
    return os.path.exists(path) and not os.path.isfile(path)


def _shown(config: DataConfig) -> str:
    return config.path if isinstance(config.path, str) else ", ".join(config.path)
