"""Pictures of results: their size, what stands where, and that they are real files."""

import json
import math

import av
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from cosmos_mcore.inference.picture import (
    GENERATED,
    GIVEN,
    PANEL_WIDTH,
    read_losses,
    sample_columns,
    side_by_side,
    write_comparison,
    write_gif,
    write_loss_curve,
    write_strip,
)


def rows(frames=17, height=32, width=48):
    grey = torch.linspace(-1, 1, frames)[:, None, None].expand(3, frames, height, width)
    return {"input": grey, "tokenizer round trip": grey.roll(1, 1), "generated": -grey}


def share(picture, colour):
    """How much of a picture [H, W, 3] uint8 has a colour."""
    return (np.abs(picture.astype(int) - np.multiply(to_rgb(colour), 255)).max(-1) < 6).mean()


def test_strip_shows_both_colours_and_grows_with_the_columns(tmp_path):
    wide = np.asarray(Image.open(write_strip(tmp_path / "wide.png", rows(), 9, 24)).convert("RGB"))
    narrow = np.asarray(Image.open(write_strip(tmp_path / "narrow.png", rows(), 9, 24, columns=3)).convert("RGB"))
    assert wide.shape[0] == narrow.shape[0]
    assert wide.shape[1] > 2 * narrow.shape[1]
    assert share(wide, GIVEN) > 0.005
    assert share(wide, GENERATED) > 0.005
    assert sorted(p.name for p in tmp_path.iterdir()) == ["narrow.png", "wide.png"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((33, 9, 9), [0, 4, 8, 12, 16, 20, 24, 28, 32]),
        ((33, 1, 5), [0, 8, 16, 24, 32]),
        ((17, 9, 3), [0, 8, 16]),
        ((9, 1, 20), list(range(9))),
        ((1, 1, 9), [0]),
    ],
)
def test_sampled_columns(arguments, expected):
    assert sample_columns(*arguments) == expected


def test_side_by_side_marks_where_generation_begins():
    frames = side_by_side(rows(), 9)
    assert len(frames) == 17
    assert frames.shape[1] % 2 == frames.shape[2] % 2 == 0
    assert frames.shape[2] >= 3 * PANEL_WIDTH
    for number in (0, 8, 9, 16):
        given, generated = share(frames[number], GIVEN), share(frames[number], GENERATED)
        assert (given > 0.01, generated > 0.01) == (number < 9, number >= 9)


def test_a_comparison_is_three_files(tmp_path):
    paths = write_comparison(tmp_path / "made", "clip", rows(), 9, 24)
    names = ["clip_side_by_side.gif", "clip_side_by_side.mp4", "clip_strip.png"]
    assert sorted(paths) == sorted((tmp_path / "made").iterdir()) == [tmp_path / "made" / name for name in names]
    with av.open(str(paths[1])) as container:
        assert sum(1 for _ in container.decode(video=0)) == 17


def test_gif_repeats_and_keeps_colours(tmp_path):
    frames = np.zeros((4, 16, 20, 3), np.uint8)
    frames[:2, :, :, 0] = 200
    frames[2:, :, :, 1] = 150
    with Image.open(write_gif(tmp_path / "small.gif", frames, 10)) as image:
        assert image.info["loop"] == 0
        colours = []
        total = 0
        for number in range(image.n_frames):
            image.seek(number)
            total += image.info["duration"]
            colours.append(image.convert("RGB").getpixel((3, 3)))
    assert total == 400  # equal frames may be merged into a longer one
    assert (colours[0], colours[-1]) == ((200, 0, 0), (0, 150, 0))


def test_fast_gifs_stay_as_fast_as_browsers_show(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4, 16, 20, 3), np.uint8)
    with Image.open(write_gif(tmp_path / "fast.gif", frames, 60)) as image:
        assert (image.n_frames, image.info["duration"]) == (4, 20)


def write_metrics(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"iteration": 9, "lm lo')
    return path


def test_losses_and_resumes_are_read(tmp_path):
    path = write_metrics(
        tmp_path / "metrics.jsonl",
        [
            {"iteration": 1, "lm loss": 11.0},
            {"iteration": 2, "lm loss": 9.0},
            {"iteration": 3, "lm loss": 7.5, "resumed from": 2},
        ],
    )
    assert read_losses(path) == ({1: 11.0, 2: 9.0, 3: 7.5}, [2])


def test_losses_that_are_no_numbers_leave_a_gap(tmp_path):
    path = write_metrics(tmp_path / "a.jsonl", [{"iteration": 1, "lm loss": 2.0}, {"iteration": 2, "lm loss": None}])
    losses, _ = read_losses(path)
    assert losses[1] == 2.0 and math.isnan(losses[2])
    assert write_loss_curve(tmp_path / "curve.png", path).stat().st_size > 0


def test_loss_curve_has_a_dashed_line_at_a_resume(tmp_path):
    records = [{"iteration": i, "lm loss": 10 / i} for i in range(1, 21)]
    plain = write_loss_curve(tmp_path / "plain.png", write_metrics(tmp_path / "a.jsonl", records))
    records[10]["resumed from"] = 10
    marked = write_loss_curve(tmp_path / "marked.png", write_metrics(tmp_path / "b.jsonl", records))
    shares = [share(np.asarray(Image.open(path).convert("RGB")), GENERATED) for path in (plain, marked)]
    assert shares[0] == 0
    assert shares[1] > 0.0005


def test_missing_and_empty_metrics_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        write_loss_curve(tmp_path / "loss.png", tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no losses yet"):
        write_loss_curve(tmp_path / "loss.png", tmp_path / "metrics.jsonl")
    assert not (tmp_path / "loss.png").exists()
