"""Prompts and the diffusion decoder through the command line, with small networks in the released files' layout."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config import RunConfig, to_yaml
from cosmos_mcore.config.schema import ModelConfig
from cosmos_mcore.inference import assemble
from cosmos_mcore.inference import main as command
from cosmos_mcore.inference.video_io import write_mp4
from cosmos_mcore.model.presets import resolve_arch
from tests.checkpoint.models import save_model
from tests.inference.diffusion import small
from tests.inference.models import text_model_weights, write_guardrail
from tests.processes import ROOT, environment
from tests.text.models import write_tiny_t5
from tests.tokenizer.released import write_released

BOX, SUN = "a red box moves left", "the sun"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Video2World model of ours with its config, and all that it needs, as downloaded."""
    folder = tmp_path_factory.mktemp("prompts")
    downloads = folder / "downloads"
    config = RunConfig()
    config.model.preset, config.model.num_layers, config.model.hidden_size = "5b-video2world", 2, 64
    config.model.ffn_hidden_size, config.model.num_attention_heads = 96, 4
    config.model.num_query_groups, config.model.kv_channels = 2, 16
    config.data.height, config.data.width, config.data.num_frames = 32, 48, 17
    config.data.prompt_cache = str(folder / "prompt_cache")
    config.precision.dtype = "fp32"
    config.tokenizer.name, config.tokenizer.path = "dv8x16x16", str(downloads / "Cosmos-Tokenize1-DV8x16x16-720p")
    save_model(downloads / "Video2World" / "model.pt", text_model_weights(resolve_arch(config.model)))
    (downloads / "Video2World" / "config.yaml").write_text(to_yaml(config))
    write_released(Path(config.tokenizer.path))
    small.write_released(downloads, replace(small.SMALL, vocab_size=64000, text_channels=1024))
    write_tiny_t5(downloads / "google-t5" / "t5-11b")
    write_guardrail(folder / "packages")
    steps = torch.linspace(0, 3, 17)[:, None, None] + torch.linspace(0, 5, 48)
    write_mp4(folder / "clip.mp4", steps.sin().expand(17, 32, 48).expand(3, 17, 32, 48), 12)
    return folder


def arguments(folder, *more):
    return ["--checkpoint_dir", str(folder / "downloads"), "--ar_model_dir", "Video2World", *map(str, more)]


def generate(folder, *more, packages="packages"):
    script = [sys.executable, "examples/generate_video.py", *arguments(folder, *more)]
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{folder / packages}")
    return subprocess.run(script, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)


def frames(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]).astype(int)


@pytest.fixture(scope="module")
def one_process(folder):
    """A batch in which a prompt comes twice, and one line has none; with it, the encoder's work is done."""
    batch, made = folder / "batch.jsonl", folder / "one"
    prompts = ({"prompt": BOX}, {}, {"prompt": BOX + "\n"}, {"prompt": SUN})
    batch.write_text(
        "".join(json.dumps({**prompt, "visual_input": str(folder / "clip.mp4")}) + "\n" for prompt in prompts)
    )
    flags = [
        "--temperature=0",
        "--compare",
        "--offload_diffusion_decoder",
        "--offload_text_encoder_model",
        "--offload_ar_model",
        "--offload_tokenizer",
    ]
    done = generate(folder, "--batch_input_path", batch, "--video_save_folder", made, *flags)
    return done, made


def test_a_batch_with_prompts(one_process):
    done, made = one_process
    assert done.returncode == 2, done.stderr[-3000:]
    assert sorted(path.name for path in made.glob("?.mp4")) == ["0.mp4", "2.mp4", "3.mp4"]
    assert sorted(path.name for path in made.glob("3*")) == [
        "3.mp4",
        *(f"3_{k}" for k in ("side_by_side.gif", "side_by_side.mp4", "strip.png")),
    ]
    assert (made / "0.mp4").read_bytes() == (made / "2.mp4").read_bytes()
    box, sun = frames(made / "0.mp4"), frames(made / "3.mp4")
    assert box.shape == (17, 32, 48, 3)
    assert abs(box - sun).mean() > 2
    assert 'batch.jsonl, line 2: has no text in "prompt"' in done.stdout
    assert "1 of 4 videos were not written" in done.stdout
    assert "UNCHECKED: no guardrail, since its weights cannot be loaded (OSError: hub offline: True)" in done.stdout
    assert "embedded 2 prompts" in done.stdout
    assert "decoded 51 frames" in done.stdout, "three videos at once"


BLOCKS_THE_SUN = """
class CosmosSafetyChecker:
    video_guardrail = text_guardrail = None

    def check_text_safety(self, prompt):
        return "sun" not in prompt

    def check_video_safety(self, frames):
        return frames
"""


@pytest.mark.parametrize("batch", [True, False])
def test_a_blocked_prompt_makes_no_video(folder, one_process, tmp_path, batch):
    (folder / "strict").mkdir(exist_ok=True)
    (folder / "strict" / "cosmos_guardrail.py").write_text(BLOCKS_THE_SUN)
    if batch:
        given = ["--batch_input_path", folder / "batch.jsonl", "--num_gpus=2"]
    else:
        given = ["--input_type=text_and_video", f"--prompt={SUN}", f"--input_image_or_video_path={folder / 'clip.mp4'}"]
    done = generate(folder, *given, "--temperature=0", "--video_save_folder", tmp_path, packages="strict")
    assert done.returncode == 2, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == (["0.mp4", "2.mp4"] if batch else [])
    if batch:
        assert done.stdout.count("error: 3: the guardrail blocks this prompt, so no video is made of it") == 1
        assert "2 of 4 videos were not written" in done.stdout and "embedded 1 prompts" in done.stdout
    else:
        assert done.stderr.splitlines()[-1] == "error: the guardrail blocks this prompt, so nothing is generated"


@pytest.mark.layouts
def test_two_processes_agree_and_need_no_text_encoder_for_known_prompts(folder, one_process, tmp_path):
    _, alone = one_process
    hidden = (folder / "downloads" / "google-t5").rename(folder / "hidden")
    try:
        line = ["--input_type=text_and_video", f"--prompt={BOX}", f"--input_image_or_video_path={folder / 'clip.mp4'}"]
        done = generate(
            folder, *line, "--temperature=0", f"--video_save_folder={tmp_path}", "--num_gpus=2", "--compare"
        )
    finally:
        hidden.rename(folder / "downloads" / "google-t5")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loading the text encoder" not in done.stdout
    for ours, theirs in (("output.mp4", "0.mp4"), ("output_side_by_side.mp4", "0_side_by_side.mp4")):
        assert abs(frames(tmp_path / ours) - frames(alone / theirs)).mean() < 0.05


def test_mistakes_are_one_line_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "configure_logging", lambda: None)
    monkeypatch.setattr(command, "processes_to_start", lambda config: 0)
    monkeypatch.setattr(assemble, "join_processes", lambda config: pytest.fail("went on"))
    downloads, made = folder / "downloads", tmp_path / "made"
    base = resolve_arch(ModelConfig("tiny", num_layers=1, hidden_size=64))
    save_model(
        downloads / "Base" / "model.pt", {name: torch.zeros(shape) for name, shape in original_shapes(base).items()}
    )
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "Video2World").mkdir(parents=True)
    for name in ("model.pt", "config.yaml"):
        (elsewhere / "Video2World" / name).symlink_to(downloads / "Video2World" / name)
    (elsewhere / small.NETWORK_FOLDER).symlink_to(downloads / small.NETWORK_FOLDER)
    no_prompts = tmp_path / "batch.jsonl"
    no_prompts.write_text(json.dumps({"visual_input": "clip.mp4"}) + "\n")
    clip, there = ["--input_image_or_video_path", folder / "clip.mp4"], ["--checkpoint_dir", elsewhere]
    unknown, plain = ["--prompt", "never embedded"], ["--ar_model_dir", "Base"]
    for more, message in (
        (clip, "is a Video2World model: say with --prompt"),
        ([*clip, "--prompt", " "], "--prompt is empty"),
        ([*clip, *plain, "--prompt", "a car"], "Base reads no text: leave --prompt"),
        ([*clip, *plain, "--input_type=text_and_image"], "Base reads no text: leave --prompt"),
        (["--prompt", "a car", "--batch_input_path", no_prompts], "leave --prompt away"),
        (["--batch_input_path", no_prompts], "names no good input"),
        ([*clip, *there, *unknown], "mean_std.pt, which are not there; get it with scripts/download_"),
        ([*clip, *there, *unknown, "--disable_diffusion_decoder"], "there is no text encoder in"),
    ):
        with pytest.raises(ValueError) as error:
            command.main(arguments(folder, "--video_save_folder", made, *more))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="there is no model in .*Cosmos-Predict1-5B-Video2World; fetch it"):
        command.main(["--checkpoint_dir", str(elsewhere), "--prompt", "a car", *map(str, clip)])
    assert list(made.iterdir()) == []
