"""Which inputs a command line names, and their frames in batches; a bad one is reported and left out."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from cosmos_mcore.config.derived import SPATIAL_COMPRESSION, VideoLayout
from cosmos_mcore.inference.pipeline import check_given, pixel_frames
from cosmos_mcore.inference.video_io import DEFAULT_FPS, frame_rate, read_conditioning
from cosmos_mcore.parallel.launch import is_rank_zero

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One input.

    Attributes:
        source: what to continue.
        name: of the result, without suffix.
        prompt: where the model reads one.
        rate: frames per second of what is read of it; known once it has been read.
    """

    source: Path
    name: str
    prompt: str | None = None
    rate: float = DEFAULT_FPS


@dataclass(frozen=True)
class Wanted:
    """What is read of each input, and what for.

    Attributes:
        layout: of the model's clips.
        frame_stride: as of ``read_conditioning``.
        num_given: frames of a video that are continued; of an image it is one.
        made_frames: of the result; None: of one clip.
        truth: read a whole clip, whose first frames are continued; only a video has one.
    """

    layout: VideoLayout
    frame_stride: int
    num_given: int
    made_frames: int | None = None
    truth: bool = False

    def read(self, source: Path) -> Tensor:
        """Frames [1, 3, T, H, W] float32 in [-1, 1] of one input.

        Raises:
            ValueError: if it cannot be read, or the model cannot continue it.
        """
        latents, *cells = self.layout.latent_shape
        height, width = (SPATIAL_COMPRESSION * number for number in cells)
        frames = pixel_frames(latents, self.layout.pixel_chunk_duration) if self.truth else self.num_given
        clip = read_conditioning(source, frames, height, width, self.frame_stride)
        if self.truth and clip.size(2) < frames:
            raise ValueError(f"--compare needs a video, whose frames are the truth, but {source} is an image")
        check_given(self.layout, clip[0, 0, : self.num_given].shape, self.made_frames)
        return clip


@dataclass
class Failures:
    """What went wrong with single inputs, while others go on; each is told at once, too."""

    lines: list[str] = field(default_factory=list)

    def add(self, where: str, error: object) -> None:
        """Notes and tells one."""
        self.lines.append(f"{where}: {error}")
        if is_rank_zero():
            logger.error("error: %s: %s", where, error)


def read_batch_file(path: Path, with_prompts: bool, failures: Failures) -> list[Item]:
    """Reads a file of one JSON object per line, as the original's.

    A line is ``{"visual_input": PATH}``, or with a prompt ``{"prompt": TEXT, "visual_input": PATH}``.

    Outputs are named by the line's number from 0: they do not depend on which other inputs are good, and two inputs of
    one base name do not get in each other's way.

    Args:
        path: of the file.
        with_prompts: whether the model reads text: each line has a prompt then. Otherwise prompts are left out, with
            one line in the log: one file may serve both kinds of models.
        failures: gets the lines that are wrong.

    Raises:
        ValueError: if there is no such file, or no line in it names an input.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; --batch_input_path needs a file with one JSON object per line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may hold other ends of lines as they are
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from None
    items: list[Item] = []
    for number, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            item = _read_line(line, str(number))
            if with_prompts and item.prompt is None:
                raise ValueError('has no text in "prompt", which a Video2World model needs')
            items.append(item)
        except ValueError as error:
            failures.add(f"{path}, line {number + 1}", error)
    if not items:
        prompt = '"prompt": "a cat jumps", ' if with_prompts else ""
        example = f'{{{prompt}"visual_input": "clip.mp4"}}'
        raise ValueError(f"{path} names no good input; give one JSON object per line: {example}")
    if not with_prompts and any(item.prompt for item in items):
        if is_rank_zero():
            logger.warning("the prompts in %s are left out: the model reads no text", path)
        items = [replace(item, prompt=None) for item in items]
    return items


def _read_line(line: str, name: str) -> Item:
    """One input; without a prompt if there is no text in it."""
    try:
        entry = json.loads(line)
        source, prompt = Path(entry["visual_input"]), entry.get("prompt")
        f"{source}{prompt}".encode()  # half a character, which JSON can hold, is a ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError('is no JSON object with a path in "visual_input"') from None
    return Item(source, name, (prompt.strip() or None) if isinstance(prompt, str) else None)


def output_names(item: Item, samples: int) -> list[str]:
    """What the videos of one input are called."""
    return [item.name] if samples == 1 else [f"{item.name}_{sample}" for sample in range(samples)]


def check_outputs(items: Sequence[Item], folder: Path, samples: int) -> None:
    """Looks whether videos can take their names, before the first one is made.

    Raises:
        ValueError: if a folder has the name, or an input, which perhaps has yet to be read.
    """
    sources = {os.path.realpath(item.source) for item in items}
    paths = [folder / f"{name}.mp4" for item in items for name in output_names(item, samples)]
    for path in paths:
        kind = "a folder" if path.is_dir() else "an input" if os.path.realpath(path) in sources else None
        if kind is not None:
            raise ValueError(
                f"{path} is {kind}, and would be overwritten; change --video_save_folder or --video_save_name"
            )


def read_batches(
    items: Sequence[Item], wanted: Wanted, size: int, failures: Failures | None
) -> Iterator[tuple[list[Item], Tensor]]:
    """Reads inputs in groups that can be generated together: at most ``size``, all with equally many frames.

    Args:
        items: in order.
        wanted: what to read.
        size: of a group.
        failures: gets those that cannot be read; None: the first one ends everything.

    Yields:
        The items, with their rates, and their frames [B, 3, T, H, W] float32 in [-1, 1].

    Raises:
        ValueError: without ``failures``, if an input cannot be read.
    """
    group: list[Item] = []
    clips: list[Tensor] = []
    for item in items:
        try:
            clip = wanted.read(item.source)
            item = replace(item, rate=frame_rate(item.source, wanted.frame_stride))
        except ValueError as error:
            if failures is None:
                raise
            failures.add(item.name, error)
            continue
        if group and (len(group) == size or clip.shape != clips[0].shape):
            yield group, torch.cat(clips)
            group, clips = [], []
        group.append(item)
        clips.append(clip)
    if group:
        yield group, torch.cat(clips)
