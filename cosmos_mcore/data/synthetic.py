"""Clips of moving shapes, to try the whole system without data.

The motion is regular on purpose, so that a tiny model learns it within minutes: a shape starts on a corner of the
tokenizer's 16-pixel grid and moves one cell per 8 frames to the side that belongs to its kind (discs to the right,
squares to the left, ...), so one frame says how a clip goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cosmos_mcore.data.encode import encode_mp4

CELL = 16  # pixels: the tokenizer's spatial compression
SPEED = 2  # pixels per frame: one cell per latent frame of 8 pixel frames
SIZE = 2 * CELL
BACKGROUND = (17, 26, 35)
COLOURS = ((250, 150, 51), (48, 150, 252), (71, 245, 41), (255, 50, 73))
VELOCITY = {"disc": SPEED, "square": -SPEED, "triangle": SPEED}  # pixels per frame, to the right


@dataclass(frozen=True)
class Shape:
    """One moving shape; ``top`` and ``left`` are pixels at frame 0."""

    kind: str
    colour: tuple[int, int, int]
    top: int
    left: int

    def left_at(self, frame: int) -> int:
        """The left edge in pixels; beyond the picture, the shape comes in again on the other side."""
        return self.left + VELOCITY[self.kind] * frame


def make_shape_clips(
    folder: str | os.PathLike[str],
    num_clips: int = 32,
    num_frames: int = 33,
    height: int = 96,
    width: int = 160,
    fps: float = 24.0,
    seed: int = 0,
    shapes_per_clip: int = 3,
) -> list[Path]:
    """Writes ``shapes_0000.mp4, ...``: coloured shapes that move steadily over a plain background.

    The same arguments give the same frames.

    Args:
        folder: is made if missing; files of the same names are replaced.
        num_clips: how many files.
        num_frames: frames of each.
        height: pixels, a multiple of 16, at least 32.
        width: pixels, a multiple of 16, at least 48.
        fps: frames per second.
        seed: of the choice of kinds, colours and places.
        shapes_per_clip: at most this many; fewer where no place is left in which they never touch.

    Returns:
        The paths, in order.

    Raises:
        ValueError: for a size that does not fit the grid.
    """
    for name, size, least in (("height", height, SIZE), ("width", width, SIZE + CELL)):
        if size % CELL or size < least:
            raise ValueError(f"{name}={size} of the demo clips must be a multiple of {CELL} and at least {least}")
    random = np.random.default_rng(seed)
    paths = []
    for clip in range(num_clips):
        shapes = _place_shapes(random, shapes_per_clip, num_frames, height, width)
        frames = draw_frames(shapes, num_frames, height, width)
        paths.append(encode_mp4(Path(folder) / f"shapes_{clip:04d}.mp4", frames, fps, crf=4))
    return paths


def draw_frames(shapes: list[Shape], num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Draws the frames of one clip.

    Returns:
        Frames uint8 [height, width, 3], RGB.
    """
    for frame in range(num_frames):
        picture = np.full((height, width, 3), BACKGROUND, dtype=np.float32)
        for shape in shapes:
            rows = shape.top + np.arange(SIZE)
            columns = (shape.left_at(frame) + np.arange(SIZE)) % width
            part = np.ix_(rows, columns)
            cover = _coverage(shape.kind)[..., None]
            picture[part] = (1 - cover) * picture[part] + cover * np.array(shape.colour, dtype=np.float32)
        yield picture.round().astype(np.uint8)


def _coverage(kind: str) -> np.ndarray:
    """How much of each pixel of a SIZE x SIZE box the shape covers: float32 [SIZE, SIZE] in 0..1."""
    half = SIZE / 2
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5 - half
    inside = {  # distance to the outline in pixels, positive inside
        # Half a pixel less than its box: so no slope lies on a threshold of the haar tokenizer, where the noise of
        # H.264 would decide between two ids.
        "disc": half - 0.5 - np.hypot(x, y),
        "square": half - np.maximum(abs(x), abs(y)),
        "triangle": np.minimum(half + x, (half - x - 2 * abs(y)) / np.sqrt(5.0)),
    }[kind]
    return np.clip(inside + 0.5, 0, 1)


def _place_shapes(
    random: np.random.Generator, count: int, num_frames: int, height: int, width: int, attempts: int = 50
) -> list[Shape]:
    """Chooses shapes that never come into the same cell of the grid within the clip."""
    shapes: list[Shape] = []
    for _ in range(attempts):
        kind = str(random.choice(list(VELOCITY)))
        shape = Shape(
            kind,
            colour=COLOURS[random.integers(len(COLOURS))],
            top=CELL * int(random.integers((height - SIZE) // CELL + 1)),
            left=_start(random, VELOCITY[kind], num_frames, width),
        )
        if not any(_meet(shape, other, num_frames, width) for other in shapes):
            shapes.append(shape)
        if len(shapes) == count:
            break
    return shapes


def _start(random: np.random.Generator, velocity: int, num_frames: int, width: int) -> int:
    """Draws a left edge on the grid, if possible one from which the shape stays inside the picture."""
    free = (width - SIZE - abs(velocity) * (num_frames - 1)) // CELL
    if free < 0:
        return CELL * int(random.integers(width // CELL))
    start = CELL * int(random.integers(free + 1))
    return start if velocity > 0 else width - SIZE - start


def _meet(one: Shape, other: Shape, num_frames: int, width: int) -> bool:
    """Whether two shapes come into the same cells in any frame."""
    if abs(one.top - other.top) >= SIZE:
        return False
    distances = ((one.left_at(frame) - other.left_at(frame)) % width for frame in range(num_frames))
    return any(min(distance, width - distance) < SIZE + CELL for distance in distances)
