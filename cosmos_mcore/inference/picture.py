"""Pictures that show a result at a glance: videos side by side, a strip of frames, the loss curve.

All of them are drawn without a display, and appear only when they are complete.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from cosmos_mcore.data.encode import encode_mp4, replaced_file
from cosmos_mcore.inference.video_io import to_frames

GIVEN, GENERATED = "#4c6a92", "#e8710a"  # the colours of conditioning and generated frames
PANEL_WIDTH = 320  # pixels: smaller videos are magnified to at least this
MARGIN, CAPTION = 12, 34  # pixels round the panels of a side-by-side frame, and above them


def write_comparison(
    folder: str | os.PathLike[str], name: str, rows: Mapping[str, Tensor], num_given: int, fps: float
) -> list[Path]:
    """Writes all pictures of one result.

    Args:
        folder: where to write; is made.
        name: what the files' names begin with.
        rows: label and video [3, T, H, W] floating in [-1, 1], all of one shape, the generated one last.
        num_given: leading frames that the model was given.
        fps: frames per second.

    Returns:
        The paths of ``NAME_strip.png``, ``NAME_side_by_side.mp4`` and ``NAME_side_by_side.gif``.
    """
    folder = Path(folder)
    frames = side_by_side(rows, num_given)
    return [
        write_strip(folder / f"{name}_strip.png", rows, num_given, fps),
        encode_mp4(folder / f"{name}_side_by_side.mp4", frames, fps),
        write_gif(folder / f"{name}_side_by_side.gif", frames, fps),
    ]


def write_strip(
    path: str | os.PathLike[str], rows: Mapping[str, Tensor], num_given: int, fps: float, columns: int = 9
) -> Path:
    """Draws sampled frames of several videos as a PNG: one row per video, one column per point in time.

    A line separates the frames that the model was given from those it had to continue; the last row, the generated one,
    has them framed in two colours.

    Args:
        path: where to write.
        rows: label and video [3, T, H, W] floating in [-1, 1], all of one shape.
        num_given: leading frames that the model was given.
        fps: frames per second, for the time labels.
        columns: how many points in time, at most.
    """
    videos = {label: to_frames(video) for label, video in rows.items()}
    num_frames, height, width, _ = next(iter(videos.values())).shape
    shown = sample_columns(num_frames, num_given, columns)
    cell_width = 1.7
    cell_height = cell_width * height / width
    label_width, head, foot, gap = 1.15, 0.68, 0.1, 0.06  # inches
    figure = Figure(
        figsize=(
            label_width + len(shown) * (cell_width + gap) + 0.1,
            head + len(videos) * (cell_height + gap) + foot,
        ),
        dpi=110,
        facecolor="white",
    )
    total_width, total_height = figure.get_size_inches()

    def box(row: int, column: int) -> tuple[float, float, float, float]:
        left = label_width + column * (cell_width + gap)
        top = total_height - head - row * (cell_height + gap)
        return (
            left / total_width,
            (top - cell_height) / total_height,
            cell_width / total_width,
            cell_height / total_height,
        )

    for row, (label, frames) in enumerate(videos.items()):
        last_row = row == len(videos) - 1
        left, bottom, _, tall = box(row, 0)
        figure.text(
            left - 0.1 / total_width, bottom + tall / 2, label.replace(" ", "\n"), ha="right", va="center", fontsize=11
        )
        for column, frame in enumerate(shown):
            axes = figure.add_axes(box(row, column))
            axes.imshow(frames[frame], interpolation="nearest" if width < 400 else "antialiased", aspect="auto")
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color((GIVEN if frame < num_given else GENERATED) if last_row else "#bbbbbb")
                spine.set_linewidth(2.5 if last_row else 0.8)
            if row == 0:
                axes.set_title(f"{frame / fps:.2f} s", fontsize=9, pad=3)
    given = sum(frame < num_given for frame in shown)
    for first, end, text, colour in (
        (0, given, "given", GIVEN),
        (given, len(shown), "to be generated", GENERATED),
    ):
        if first < end:
            left, right = box(0, first)[0], box(0, end - 1)[0] + box(0, end - 1)[2]
            y = 1 - 0.36 / total_height
            figure.add_artist(
                Rectangle((left, y), right - left, 0.045 / total_height, color=colour, transform=figure.transFigure)
            )
            figure.text((left + right) / 2, y + 0.12 / total_height, text, ha="center", fontsize=11, color=colour)
    with replaced_file(path) as temporary:
        FigureCanvasAgg(figure)
        figure.savefig(temporary)
    return Path(path)


def sample_columns(num_frames: int, num_given: int, columns: int) -> list[int]:
    """Chooses frames to show: evenly spaced, with the first, the last, and the last given one among them."""
    even = np.linspace(0, num_frames - 1, min(columns, num_frames)).round().astype(int).tolist()
    if 0 < num_given < num_frames:
        nearest = min(range(len(even)), key=lambda i: abs(even[i] - (num_given - 1)))
        even[nearest] = num_given - 1
    return sorted(set(even) | {0, num_frames - 1})


def side_by_side(rows: Mapping[str, Tensor], num_given: int) -> np.ndarray:
    """Puts videos next to each other, each under its label; the last one's frame tells given from generated.

    Args:
        rows: label and video [3, T, H, W] floating in [-1, 1], all of one shape.
        num_given: leading frames that the model was given.

    Returns:
        Frames uint8 [T, H', W', 3], H' and W' even.
    """
    videos = [to_frames(video) for video in rows.values()]
    num_frames, height, width, _ = videos[0].shape
    magnify = max(1, -(-PANEL_WIDTH // width))
    height, width = height * magnify, width * magnify
    size = (MARGIN + len(videos) * (width + MARGIN), CAPTION + height + MARGIN)
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 17)
    pictures = []
    for number in range(num_frames):
        picture = Image.new("RGB", tuple(n + n % 2 for n in size), "white")
        draw = ImageDraw.Draw(picture)
        for panel, (label, video) in enumerate(zip(rows, videos, strict=True)):
            left, top = MARGIN + panel * (width + MARGIN), CAPTION
            colour = "#222222"
            if panel == len(videos) - 1:
                colour = GIVEN if number < num_given else GENERATED
                label = f"{label} (given frames)" if number < num_given else label
                draw.rectangle((left - 4, top - 4, left + width + 3, top + height + 3), fill=colour)
            draw.text((left, CAPTION - 8), label, fill=colour, font=font, anchor="ls")
            picture.paste(Image.fromarray(video[number]).resize((width, height), Image.Resampling.NEAREST), (left, top))
        pictures.append(np.asarray(picture))
    return np.stack(pictures)


def write_gif(path: str | os.PathLike[str], frames: np.ndarray, fps: float) -> Path:
    """Writes frames as an animated GIF that repeats for ever.

    Args:
        path: where to write.
        frames: uint8 [T, H, W, 3].
        fps: frames per second; GIF counts time in hundredths of a second, and browsers show 10 frames per second where
            it says more than 50, so 50 are the most.
    """
    pictures = [Image.fromarray(frame) for frame in frames]
    # One palette for all frames, or plain areas flicker.
    palette = Image.fromarray(np.concatenate((frames[0], frames[-1]))).quantize(255)
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
    with replaced_file(path) as temporary:
        pictures[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=pictures[1:],
            duration=max(20, round(1000 / fps)),
            loop=0,
        )
    return Path(path)


def write_loss_curve(path: str | os.PathLike[str], metrics: str | os.PathLike[str]) -> Path:
    """Draws the loss over the iterations of a run as a PNG, with a dashed line wherever the run was resumed.

    Args:
        path: where to write.
        metrics: the run's ``metrics.jsonl``.

    Raises:
        ValueError: if the metrics are missing or hold no losses.
    """
    losses, resumed = read_losses(metrics)
    iterations, values = list(losses), list(losses.values())
    figure = Figure(figsize=(8, 4.5), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.plot(iterations, values, color=GIVEN, linewidth=1.6)
    for number, iteration in enumerate(resumed):
        label = None if number else "stopped and resumed"
        axes.axvline(iteration + 0.5, color=GENERATED, linestyle="--", linewidth=1.3, label=label)
    axes.set_title(f"lm loss: {values[0]:.3g} at the start, {values[-1]:.3g} at the end", fontsize=11)
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss (nats per token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if resumed:
        axes.legend(frameon=False)
    FigureCanvasAgg(figure)
    with replaced_file(path) as temporary:
        figure.savefig(temporary)
    return Path(path)


def read_losses(metrics: str | os.PathLike[str]) -> tuple[dict[int, float], list[int]]:
    """Reads a run's ``metrics.jsonl``; a last line that a kill has cut off is passed over.

    Returns:
        ``lm loss`` of each logged iteration, NaN where it was not finite, and the iterations of the checkpoints that
        the run was resumed from.

    Raises:
        ValueError: if the file is missing or holds no losses.
    """
    try:
        lines = Path(metrics).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"the metrics {metrics} cannot be read: {error.strerror}") from error
    losses, resumed = {}, []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        loss = record["lm loss"]
        losses[int(record["iteration"])] = math.nan if loss is None else float(loss)
        if "resumed from" in record:
            resumed.append(int(record["resumed from"]))
    if not losses:
        raise ValueError(f"the metrics {metrics} hold no losses yet")
    return losses, resumed
