"""Clips of moving shapes, to try the whole system without data.

The motion is regular on purpose, so that a tiny model learns it within minutes: a shape starts on a corner of the
tokenizer's 16-pixel grid and moves one cell per 8 frames, in the direction that belongs to its kind (discs to the
right, squares to the left, ...), entering on the other side where it leaves. So one frame says how a clip goes on.
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
BACKGROUND = (26, 28, 44)
COLOURS = ((239, 125, 87), (65, 166, 246), (167, 240, 112), (255, 205, 117))
DIRECTIONS = {"disc": (0, 1), "square": (0, -1), "triangle": (-1, 0), "diamond": (1, 0)}  # (down, right) per frame


@dataclass(frozen=True)
class Shape:
    """One moving shape; ``top`` and ``left`` are pixels at frame 0."""

    kind: str
    colour: tuple[int, int, int]
    top: int
    left: int

    def position(self, frame: int) -> tuple[int, int]:
        """Top and left corner in pixels, before wrapping round the edges of the picture."""
        down, right = DIRECTIONS[self.kind]
        return self.top + SPEED * down * frame, self.left + SPEED * right * frame


def make_shape_clips(
    folder: str | os.PathLike[str],
    num_clips: int = 32,
    num_frames: int = 33,
    height: int = 96,
    width: int = 160,
    fps: float = 24.0,
    seed: int = 0,
    shapes_per_clip: int = 2,
) -> list[Path]:
    """Writes ``shapes_0000.mp4, ...``: coloured shapes that move steadily over a plain background.

    The same arguments give the same frames.

    Args:
        folder: is made if missing; files of the same names are replaced.
        num_clips: how many files.
        num_frames: frames of each.
        height: pixels, a multiple of 16, at least 48.
        width: pixels, a multiple of 16, at least 48.
        fps: frames per second.
        seed: of the choice of kinds, colours and places.
        shapes_per_clip: at most this many; fewer where no place is left in which they never touch.

    Returns:
        The paths, in order.

    Raises:
        ValueError: for a size that does not fit the grid.
    """
    for name, size in (("height", height), ("width", width)):
        if size % CELL or size < SIZE + CELL:
            raise ValueError(f"{name}={size} of the demo clips must be a multiple of {CELL} and at least {SIZE + CELL}")
    random = np.random.default_rng(seed)
    paths = []
    for clip in range(num_clips):
        shapes = _place_shapes(random, shapes_per_clip, num_frames, height, width)
        frames = draw_frames(shapes, num_frames, height, width)
        paths.append(encode_mp4(Path(folder) / f"shapes_{clip:04d}.mp4", frames, fps, crf=8))
    return paths


def draw_frames(shapes: list[Shape], num_frames: int, height: int, width: int) -> Iterator[np.ndarray]:
    """Draws the frames of one clip.

    Returns:
        Frames uint8 [height, width, 3], RGB.
    """
    for frame in range(num_frames):
        picture = np.full((height, width, 3), BACKGROUND, dtype=np.float32)
        for shape in shapes:
            top, left = shape.position(frame)
            rows, columns = (top + np.arange(SIZE)) % height, (left + np.arange(SIZE)) % width
            part = np.ix_(rows, columns)
            cover = _coverage(shape.kind)[..., None]
            picture[part] = (1 - cover) * picture[part] + cover * np.array(shape.colour, dtype=np.float32)
        yield picture.round().astype(np.uint8)


def _coverage(kind: str) -> np.ndarray:
    """How much of each pixel of a SIZE x SIZE box the shape covers: float32 [SIZE, SIZE] in 0..1."""
    half = SIZE / 2
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32) + 0.5 - half
    inside = {  # distance to the outline in pixels, positive inside
        "disc": half - 1 - np.hypot(x, y),
        "square": half - 2 - np.maximum(abs(x), abs(y)),
        "diamond": (half - 1 - abs(x) - abs(y)) / np.sqrt(2.0),
        "triangle": np.minimum(half - 2 - y, (half + y - 2 - 2 * abs(x)) / np.sqrt(5.0)),
    }[kind]
    return np.clip(inside + 0.5, 0, 1)


def _place_shapes(
    random: np.random.Generator, count: int, num_frames: int, height: int, width: int, attempts: int = 50
) -> list[Shape]:
    """Chooses shapes that never come into the same cell of the grid within the clip."""
    shapes: list[Shape] = []
    for _ in range(attempts):
        kind = str(random.choice(list(DIRECTIONS)))
        down, right = DIRECTIONS[kind]
        shape = Shape(
            kind,
            colour=COLOURS[random.integers(len(COLOURS))],
            top=_start(random, down, height, num_frames),
            left=_start(random, right, width, num_frames),
        )
        if not any(_meet(shape, other, num_frames, height, width) for other in shapes):
            shapes.append(shape)
        if len(shapes) == count:
            break
    return shapes


def _start(random: np.random.Generator, direction: int, size: int, num_frames: int) -> int:
    """Draws a start on the grid along one axis, in pixels; where the picture has room, no edge cuts the shape."""
    path = abs(direction) * SPEED * (num_frames - 1)
    free = (size - SIZE - path) // CELL
    if free < 0:
        return CELL * int(random.integers(size // CELL))
    start = CELL * int(random.integers(free + 1))
    return start if direction >= 0 else size - SIZE - start


def _meet(one: Shape, other: Shape, num_frames: int, height: int, width: int) -> bool:
    """Whether two shapes come closer than one cell in any frame."""
    for frame in range(num_frames):
        (top, left), (other_top, other_left) = one.position(frame), other.position(frame)
        down, right = (top - other_top) % height, (left - other_left) % width
        if min(down, height - down) < SIZE + CELL and min(right, width - right) < SIZE + CELL:
            return True
    return False
