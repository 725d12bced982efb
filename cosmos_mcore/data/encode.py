"""Writes frames as an MP4 that every player opens: H.264, yuv420p."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


@contextmanager
def replaced_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to; it becomes ``path`` only if the block succeeds.

    Makes the parent folder. A reader sees the old file or the whole new one, never a half-written one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def encode_mp4(path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float, crf: int = 16) -> Path:
    """Encodes frames into ``path``, which appears only when it is complete.

    Args:
        path: where to write; the folder is made, an existing file is replaced.
        frames: uint8 [H, W, 3] RGB, all of one size, H and W even (yuv420p stores colour for 2 x 2 pixels).
        fps: frames per second.
        crf: x264's constant rate factor: 0 lossless, 18 looks the same to the eye, 51 worst.

    Returns:
        The path.

    Raises:
        ValueError: no frames, frames of another shape or dtype, or an odd size.
    """
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"there are no frames to write to {path}")
    height, width = first.shape[:2]
    if height % 2 or width % 2:
        raise ValueError(f"cannot write {path} with frames of {height}x{width}: H.264 needs an even height and width")
    with (
        replaced_file(path) as temporary,
        av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # Without the threads of x264's look-ahead the same frames always give the same file.
        stream.options = {"crf": str(crf), "x264-params": "rc-lookahead=0:sync-lookahead=0"}
        for frame in _same_shape(first, frames, path):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def _same_shape(first: np.ndarray, others: Iterator[np.ndarray], path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Passes the frames on in memory order, refusing what is no RGB frame of the first one's size."""
    shape = (*first.shape[:2], 3)
    frame: np.ndarray | None = first
    while frame is not None:
        if frame.shape != shape or frame.dtype != np.uint8:
            raise ValueError(f"frames for {path} must be uint8 {list(shape)}, not {frame.dtype} {list(frame.shape)}")
        yield np.ascontiguousarray(frame)
        frame = next(others, None)
