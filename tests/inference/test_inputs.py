"""The inputs of a command line: a bad one is reported and left out, and never touches its neighbours."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference.inputs import Failures, Item, Wanted, check_outputs, read_batch_file, read_batches
from cosmos_mcore.inference.video_io import write_mp4

WANTED = Wanted(VideoLayout(17, (3, 1, 2), False, 6, 1), 1, 9)


def video(path, frames):
    return write_mp4(path, torch.linspace(-1, 1, 32).expand(3, frames, 16, 32), 24)


def test_a_batch_file_names_outputs_by_line(tmp_path):
    file = tmp_path / "batch.jsonl"
    lines = [json.dumps({"visual_input": "a/clip.mp4"}), "", "{", '["x"]', '{"other": 1}', '{"visual_input": 3}']
    file.write_text("\n".join([*lines, json.dumps({"visual_input": "b/clip.mp4"})]) + "\n")
    failures = Failures()
    items = read_batch_file(file, False, failures)
    assert [(str(item.source), item.name) for item in items] == [("a/clip.mp4", "0"), ("b/clip.mp4", "6")]
    assert [line.split(": ")[0].rpartition(" ")[2] for line in failures.lines] == ["3", "4", "5", "6"]


def test_lines_end_where_a_file_s_do_and_hold_whole_characters(tmp_path):
    file, prompt = tmp_path / "batch.jsonl", "rain\u2028and\x85sun"
    good = json.dumps({"visual_input": "clip.mp4", "prompt": prompt}, ensure_ascii=False)
    halves = [json.dumps({"visual_input": "\ud800"}), json.dumps({"visual_input": "clip.mp4", "prompt": "\ud800"})]
    file.write_text("\n".join([good, *halves, good]), encoding="utf-8-sig")
    failures = Failures()
    clip = Path("clip.mp4")
    assert read_batch_file(file, True, failures) == [Item(clip, "0", prompt), Item(clip, "3", prompt)]
    assert [line.split(": ")[0].rpartition(" ")[2] for line in failures.lines] == ["2", "3"]


def test_lines_have_prompts_where_the_model_reads_text(tmp_path, caplog):
    file = tmp_path / "batch.jsonl"
    entries = [{}, {"prompt": " a red ball\n"}, {"prompt": " "}, {"prompt": 3}, {"prompt": None}]
    file.write_text("".join(json.dumps({"visual_input": "clip.mp4", **entry}) + "\n" for entry in entries))
    failures = Failures()
    assert read_batch_file(file, True, failures) == [Item(Path("clip.mp4"), "1", "a red ball")]
    assert len(failures.lines) == 4 and all('has no text in "prompt"' in line for line in failures.lines)
    caplog.clear()
    failures = Failures()
    assert [(item.name, item.prompt) for item in read_batch_file(file, False, failures)] == [
        (str(n), None) for n in range(5)
    ]
    assert not failures.lines and "prompts in" in caplog.text and caplog.text.count("the model reads no text") == 1


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no file"), (b"\n", "names no good input"), (b"\xff", "as text")]
)
def test_a_batch_file_without_inputs_is_refused(tmp_path, content, message):
    file = tmp_path / "batch.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_batch_file(file, False, Failures())


def test_groups_hold_what_can_be_generated_together(tmp_path):
    good, short = video(tmp_path / "good.mp4", 12), video(tmp_path / "short.mp4", 3)
    picture, sound = tmp_path / "picture.png", tmp_path / "sound.mp4"
    Image.new("RGBA", (40, 40), "red").save(picture)
    sound.write_bytes(b"RIFF....WAVE")
    paths = [good, short, good, tmp_path / "missing.mp4", good, picture, sound, good]
    items = [Item(path, str(number)) for number, path in enumerate(paths)]
    failures = Failures()
    batches = list(read_batches(items, WANTED, 2, failures))
    assert [[item.rate for item in group] for group, _ in batches] == [[24, 24], [24], [25], [24]]
    groups = [([item.name for item in group], clips) for group, clips in batches]
    assert [names for names, _ in groups] == [["0", "2"], ["4"], ["5"], ["7"]]
    assert [tuple(clips.shape) for _, clips in groups] == [
        (n, 3, t, 16, 32) for n, t in ((2, 9), (1, 9), (1, 1), (1, 9))
    ]
    assert [line.split(":")[0] for line in failures.lines] == ["1", "3", "6"]
    assert "has 3 frames, but 9 are needed" in failures.lines[0]


def test_nothing_to_generate_is_a_matter_of_each_input(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 20)).save(picture)
    items = [Item(video(tmp_path / "good.mp4", 12), "0"), Item(picture, "1"), Item(Path("a" * 300), "2")]
    failures = Failures()
    ((group, clips),) = read_batches(items, replace(WANTED, made_frames=5), 2, failures)
    assert ([item.name for item in group], clips.size(2)) == (["1"], 1)
    assert failures.lines[0] == "0: a video of 5 frames leaves nothing to generate after 9 given ones"
    assert failures.lines[1].startswith("2: there is no file aaa")


def test_more_given_frames_than_clips_have_are_a_matter_of_each_input(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 20)).save(picture)
    items, failures = [Item(video(tmp_path / "good.mp4", 12), "0"), Item(picture, "1")], Failures()
    wanted = replace(WANTED, layout=VideoLayout(9, (2, 1, 2), False, 4, 1))
    ((group, _),) = read_batches(items, wanted, 2, failures)
    assert [item.name for item in group] == ["1"]
    assert failures.lines[0].startswith("0: 9 given frames do not fit")


def test_no_video_takes_the_place_of_an_input(tmp_path):
    made = tmp_path / "made"
    made.mkdir()
    (tmp_path / "link").symlink_to(made)
    (made / "folder.mp4").mkdir()
    source = video(made / "1.mp4", 1)
    items = [Item(tmp_path / "clip.mp4", "0"), Item(tmp_path / "link" / "1.mp4", "2")]
    check_outputs(items, made, 1)
    for name, samples, message in (("1", 1, "is an input"), ("folder", 1, "is a folder"), ("other", 2, "is an input")):
        if samples == 2:
            items = [Item(source.rename(made / "other_1.mp4"), "0")]
        with pytest.raises(ValueError, match=message):
            check_outputs([*items, Item(tmp_path / "clip.mp4", name)], made, samples)


def test_a_single_input_s_mistake_ends_everything(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        next(read_batches([Item(tmp_path / "missing.mp4", "output")], WANTED, 8, None))
