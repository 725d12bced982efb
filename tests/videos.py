"""Small MP4 files with known content, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

STAMP_BITS = 12
TICKS_PER_FRAME = 16


def moving_square(index: int, height: int, width: int) -> np.ndarray:
    """One RGB frame [H, W, 3] uint8: a red square that moves right over a blue-grey ground, one step per frame."""
    frame = np.full((height, width, 3), (40, 60, 90), dtype=np.uint8)
    size = height // 3
    left = (3 * index) % (width - size)
    top = height // 4
    frame[top : top + size, left : left + size] = (220, 40, 30)
    return frame


def stamped(index: int, height: int, width: int) -> np.ndarray:
    """A moving square with the frame's number as a row of black and white bars on top: see ``read_stamp``."""
    frame = moving_square(index, height, width)
    for bit in range(STAMP_BITS):
        left, right = bit * width // STAMP_BITS, (bit + 1) * width // STAMP_BITS
        frame[: height // 5, left:right] = 255 if index >> bit & 1 else 0
    return frame


def read_stamp(frame: np.ndarray) -> int:
    """Reads the number that ``stamped`` drew into a frame [H, W, 3] uint8, also after lossy compression."""
    height, width = frame.shape[:2]
    centres = [(2 * bit + 1) * width // (2 * STAMP_BITS) for bit in range(STAMP_BITS)]
    return sum(int(frame[height // 10, centre].mean() > 127) << bit for bit, centre in enumerate(centres))


def write_test_clip(
    path: Path,
    num_frames: int,
    height: int = 48,
    width: int = 96,
    *,
    fps: int = 30,
    gop: int = 12,
    bframes: int = 2,
    draw: Callable[[int, int, int], np.ndarray] = stamped,
    timestamps: Sequence[int] | None = None,
    rotation: int = 0,
    codec: str = "libx264",
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes an MP4 file and returns its path.

    Args:
        draw: makes frame ``index`` from (index, height, width).
        timestamps: of each frame in ticks, 16 per frame at the nominal rate; default: a constant rate from 0.
        rotation: degrees counterclockwise that a player must turn the frames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"preset": "ultrafast", "crf": "18", "g": str(gop), "bf": str(bframes), **(codec_options or {})}
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = Fraction(1, TICKS_PER_FRAME * fps)
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(index, height, width), format="rgb24")
            frame.time_base = stream.codec_context.time_base
            frame.pts = TICKS_PER_FRAME * index if timestamps is None else timestamps[index]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_audio_only(path: Path) -> Path:
    """Writes a second of silence as an MP4 file without pictures, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for index in range(16):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * index, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
