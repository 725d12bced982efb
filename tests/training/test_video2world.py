"""Training on videos and prompts: real runs of a tiny text-to-video model, with embeddings of a tiny T5."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_mcore.config import load_config
from cosmos_mcore.data import embed_prompts
from cosmos_mcore.data.mp4 import Mp4File
from cosmos_mcore.data.synthetic import make_shape_clips
from cosmos_mcore.training.preflight import derived_numbers, preflight
from tests.processes import ROOT, environment, run_ranks
from tests.text.models import write_tiny_t5
from tests.training.conftest import Command
from tests.training.video2world_worker import HALF

STEPS = 12
PICTURES = "teacher_forcing_interval"
CONFIG = """
job: {{project: tests, group: small, name: run}}
model:
  preset: 5b-video2world
  num_layers: 2
  hidden_size: 48
  ffn_hidden_size: 64
  num_attention_heads: 4
  num_query_groups: 2
  kv_channels: 12
data:
  path: {videos}
  height: 64
  width: 96
  num_frames: 17
  start_frame_interval: 8
  prompts: {videos}/prompts.jsonl
  prompt_cache: {cache}
  token_cache: {videos}/tokens
precision: {{dtype: fp32}}
optimizer: {{lr: 4.0e-3}}
schedule: {{warmup_iters: 2, decay_iters: 12}}
training: {{train_iters: 12, global_batch_size: 4, micro_batch_size: 2}}
checkpoint: {{save_interval: 6}}
logging: {{tensorboard: false}}
"""
WORDS = ("robot arm", "red box", "car", "sun and rain", "a car turns left and the robot lifts the box", "right")


def write_run(folder, videos):
    """Prompts, their embeddings, and the config of a run on these videos; returns the config's path."""
    lines = [
        {"visual_input": video.name, "prompt": f"The {WORDS[number % len(WORDS)]} moves."}
        for number, video in enumerate(videos)
    ]
    (videos[0].parent / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(videos=videos[0].parent, cache=folder / "cache"))
    assert embed_prompts.main([str(path), "--text_encoder", str(write_tiny_t5(folder / "t5"))]) == 0
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video2world")
    return write_run(folder, make_shape_clips(folder / "videos", num_clips=6, num_frames=25, height=64, width=96))


def curve_of(run):
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, "")
    return run.metrics()


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """One process's run from the first step to the last: its folder and its numbers."""
    videos = config.parent / "videos"
    watching = (f"data.validation_path={videos}", f"training.eval_interval={HALF}", f"logging.{PICTURES}={HALF}")
    watching += (f"logging.sample_interval={HALF}",)
    run = Command([config, *watching], tmp_path_factory.mktemp("whole"))
    curve = curve_of(run)
    assert len(list((run.folder / "video_sampling_teacher_forcing").glob("*.jpg"))) == 2
    assert len(list((run.folder / "samples").glob("*.mp4"))) == 2
    return run.folder, curve


@pytest.fixture
def curve(whole):
    return whole[1]


def test_it_learns(curve):
    assert [record["iteration"] for record in curve] == list(range(1, STEPS + 1))
    assert curve[-1]["lm loss"] < 0.9 * curve[0]["lm loss"]
    # The validation's videos are those of training, and it reads their prompts.
    validated = {
        record["iteration"]: record["validation lm loss"] for record in curve if "validation lm loss" in record
    }
    assert sorted(validated) == [HALF, STEPS]
    assert validated[STEPS] < validated[HALF] < curve[0]["lm loss"]


def test_the_run_goes_on_with_a_video_and_a_prompt(whole, config, tmp_path):
    """With training's embeddings: there is no text encoder where generation would look for it."""
    video = min((config.parent / "videos").glob("*.mp4"))
    line = ["--checkpoint", whole[0], "--input_image_or_video_path", video, "--prompt", "The robot arm moves."]
    command = [sys.executable, "examples/generate_video.py", *line, "--video_save_folder", tmp_path]
    done = subprocess.run(
        [*map(str, command)], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loading the text encoder" not in done.stdout
    with Mp4File(tmp_path / "output.mp4") as made:
        assert made.num_frames == 17


@pytest.mark.layouts
def test_other_layouts_and_a_resume_give_the_same_curve(config, curve, tmp_path):
    lines = [json.loads(line) for line in (config.parent / "videos" / "prompts.jsonl").read_text().splitlines()]
    for line, other in zip(lines, [line["prompt"] for line in lines[1:] + lines[:1]], strict=True):
        line |= {"visual_input": str(config.parent / "videos" / line["visual_input"]), "prompt": other}
    (tmp_path / "swapped.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run_ranks("tests.training.video2world_worker", 2, config, tmp_path)
    for name, steps in (("resumed", STEPS), ("context", HALF), ("data", HALF)):
        lines = (tmp_path / "tests" / "small" / name / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert [record["iteration"] for record in found] == list(range(1, steps + 1))
        assert [record["iteration"] for record in found if "resumed from" in record] == [HALF + 1] * (steps > HALF)
        for key, tolerance in (("lm loss", 1e-5), ("z loss", 1e-5), ("grad norm", 1e-4)):
            expected = [record[key] for record in curve[:steps]]
            assert [record[key] for record in found] == pytest.approx(expected, rel=tolerance), (name, key)
    # A text of another clip would have been noticed.
    swapped = json.loads((tmp_path / "tests" / "small" / "swapped" / "metrics.jsonl").read_text())
    assert abs(swapped["lm loss"] / curve[0]["lm loss"] - 1) > 5e-5


def test_without_the_videos(command, config, curve):
    """The ids come from the token cache alone, the prompts by the videos' paths."""
    found = curve_of(command(config, f"data.path={config.parent / 'videos' / 'tokens'}", "training.train_iters=2"))
    assert [record["lm loss"] for record in found] == pytest.approx(
        [record["lm loss"] for record in curve[:2]], rel=1e-6
    )


def test_real_clips(command, shared_dir, tmp_path):
    videos = [Path(shutil.copy(path, tmp_path)) for path in sorted((shared_dir / "videos").glob("*.mp4"))]
    curve = curve_of(command(write_run(tmp_path, videos), "data.start_frame_interval=1000"))  # one clip of each
    assert curve[-1]["lm loss"] < 0.9 * curve[0]["lm loss"]


def refused(config, *changes):
    with pytest.raises(ValueError) as caught:
        preflight(load_config(config, changes), 1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_found_before_the_run(config, tmp_path):
    preflight(load_config(config), 1)
    assert f"embeddings in {config.parent / 'cache'}" in derived_numbers(load_config(config), 1)
    message = refused(config, f"data.prompt_cache={tmp_path}")
    assert f"6 of the 6 prompts have no embedding in {tmp_path} yet, for example 'The robot arm moves.'" in message
    assert "make them with scripts/embed_prompts.py and this config" in message
    assert "none of the 6 videos has a prompt" in refused(config, "data.prompts=null")
    assert "cannot be read (No such file" in refused(config, f"data.prompts={tmp_path / 'nowhere'}")
    assert "data.prompts=all.jsonl, but model.preset=4b reads no text; set data.prompts to null, or choose" in refused(
        config, "model.preset=4b", "data.prompts=all.jsonl"
    )
