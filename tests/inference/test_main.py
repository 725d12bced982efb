"""The command line: what it writes, under which names, and one line for every mistake."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import av
import pytest
import torch
from PIL import Image

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config import RunConfig, load_config, to_yaml
from cosmos_mcore.inference import main as command
from cosmos_mcore.inference.inputs import Item
from cosmos_mcore.inference.video_io import write_mp4
from cosmos_mcore.model.init import initial_tensor
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel.initialize import shut_down
from tests.checkpoint.models import save_model
from tests.processes import ROOT, environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A downloaded model of ours with its config, and inputs."""
    folder = tmp_path_factory.mktemp("generation")
    config = RunConfig()
    config.model.preset, config.model.num_layers, config.model.hidden_size = "tiny", 2, 64
    config.data.height, config.data.width, config.data.num_frames = 32, 48, 17
    config.precision.dtype = "fp32"
    arch = resolve_arch(config.model)
    cpu = torch.device("cpu")
    weights = {name: initial_tensor(name, shape, arch, 0, cpu) for name, shape in original_shapes(arch).items()}
    save_model(folder / "checkpoints" / "tiny" / "model.pt", weights)
    (folder / "checkpoints" / "tiny" / "config.yaml").write_text(to_yaml(config))
    write_mp4(folder / "clip.mp4", torch.linspace(-1, 1, 48).expand(3, 12, 32, 48), 12)
    write_mp4(folder / "short.mp4", torch.zeros(3, 3, 32, 48), 12)
    Image.new("L", (64, 64), 90).save(folder / "picture.webp")
    (folder / "sound.wav").write_bytes(b"RIFF0000WAVEfmt ")
    (folder / "released").mkdir()
    save_model(folder / "released" / "Cosmos-Predict1-12B" / "model.pt", weights)
    save_model(folder / "released" / "mine" / "model.pt", weights)
    return folder


def arguments(folder, *more):
    return ["--checkpoint_dir", str(folder / "checkpoints"), "--ar_model_dir", "tiny", *map(str, more)]


def facts(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return sum(1 for _ in container.decode(stream)), float(stream.average_rate), stream.height, stream.width


def generate(folder, *more, **env):
    script = [sys.executable, "examples/generate_video.py", *arguments(folder, *more)]
    return subprocess.run(script, cwd=ROOT, env=environment(**env), capture_output=True, text=True, timeout=240)


BLOCKS_THE_FOURTH = """
class CosmosSafetyChecker:
    video_guardrail, seen = None, 0

    def check_video_safety(self, frames):
        self.seen += 1
        return None if self.seen == 4 else frames
"""


def test_the_original_s_line_with_its_flags(folder, tmp_path):
    made = tmp_path / "made"
    done = generate(
        folder,
        "--input_type=video",
        f"--input_image_or_video_path={folder / 'clip.mp4'}",
        "--video_save_name=Cosmos-Predict1-4B",
        f"--video_save_folder={made}",
        "--top_p=0.8",
        "--temperature=1.0",
        "--offload_diffusion_decoder",
        "--offload_tokenizer",
        "--num_frames=20",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in made.iterdir()] == ["Cosmos-Predict1-4B.mp4"]
    assert facts(made / "Cosmos-Predict1-4B.mp4") == (20, 12, 32, 48)
    assert "UNCHECKED" in done.stdout


def test_a_batch_on_two_processes_goes_on_past_bad_inputs(folder, tmp_path):
    package = tmp_path / "cosmos_guardrail.py"
    package.write_text(BLOCKS_THE_FOURTH)
    batch, made = tmp_path / "batch.jsonl", tmp_path / "made"
    names = ["clip.mp4", "missing.mp4", "sound.wav", "short.mp4", "picture.webp", "clip.mp4"]
    batch.write_text("".join(json.dumps({"visual_input": str(folder / name)}) + "\n" for name in names))
    more = ["--batch_input_path", batch, "--video_save_folder", made, "--num_gpus", "2", "--num_samples", "2"]
    done = generate(folder, *more, "--seed", "5", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    assert done.returncode == 2, done.stderr[-3000:]
    assert sorted(path.name for path in made.iterdir()) == [
        f"{name}.mp4" for name in ("0_0", "0_1", "4_0", "5_0", "5_1")
    ]
    assert facts(made / "0_0.mp4") == (17, 12, 32, 48)
    assert facts(made / "4_0.mp4") == (17, 25, 32, 48)
    assert (made / "0_1.mp4").read_bytes() == (made / "5_1.mp4").read_bytes()
    assert (made / "0_0.mp4").read_bytes() != (made / "0_1.mp4").read_bytes()
    assert "error: 4_1: the guardrail blocks this video" in done.stdout
    assert "7 of 12 videos were not written" in done.stdout
    assert done.stdout.count("error: 1: ") == 1, "told once, not by every process"


def test_mistakes_are_one_line_and_leave_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "configure_logging", lambda: None)
    monkeypatch.setattr(command, "processes_to_start", lambda config: 0)
    made = tmp_path / "made"
    clip = ["--input_image_or_video_path", folder / "clip.mp4"]
    plain_file = tmp_path / "file"
    plain_file.touch()
    released = ["--checkpoint_dir", folder / "released"]
    other = tmp_path / "other.yaml"
    other.write_text("model:\n  preset: tiny\n")
    own = tmp_path / "own.yaml"
    config = load_config(folder / "checkpoints" / "tiny" / "config.yaml")
    config.tokenizer.name, config.tokenizer.path = "dv8x16x16", str(tmp_path)
    own.write_text(to_yaml(config))
    for more, message in (
        ([], "give --input_image_or_video_path"),
        (["--input_image_or_video_path", folder / "missing.mp4"], "there is no file"),
        (["--input_image_or_video_path", folder / "sound.wav"], "sound.wav"),
        (["--input_image_or_video_path", folder / "short.mp4"], "has 3 frames, but 9 are needed"),
        ([*clip, "--compare"], "has 12 frames, but 17 are needed"),
        (["--input_image_or_video_path", folder / "picture.webp", "--compare"], "--compare needs a video"),
        ([*clip, "--video_save_folder", plain_file / "below"], "cannot be made"),
        ([*clip, "--video_save_name", "a/b"], "must be a name"),
        ([*clip, "--num_frames", 9], "leaves nothing to generate"),
        ([*clip, "--num_samples", 9], "at most 8"),
        ([*clip, "--fps", 0], "--fps 0.0 must lie between 0.01 and 1000"),
        ([*clip, "--fps", "nan"], "--fps nan must lie between"),
        ([*clip, "--video_save_name="], "must be a name"),
        ([*clip, "--video_save_name", "n" * 201], "--video_save_name is too long"),
        ([*clip, "--video_save_folder", folder, "--video_save_name", "clip"], "clip.mp4 is an input, and would be"),
        ([*clip, "--batch_input_path", folder / "missing.jsonl"], "both name inputs"),
        ([*clip, "--config", own, *released, "--ar_model_dir", "mine"], "tokenizer.path in"),
        ([*clip, "--seed", -1], "--seed -1"),
        ([*clip, "--top_p", 2], "top_p=2.0 must lie between"),
        ([*clip, "--height", 40], "data.height=40 must be a multiple of 16"),
        ([*clip, "--num_gpus", 3], "does not divide"),
        ([*clip, "--ar_model_dir", "absent"], "download_autoregressive_checkpoints.py"),
        ([*clip, *released, "--ar_model_dir", "Cosmos-Predict1-12B"], "is not a 12B model"),
        ([*clip, *released, "--ar_model_dir", "mine"], "--config with the YAML file that it was trained with"),
        ([*clip, "--config", other, "--checkpoint", folder / "checkpoints" / "tiny"], "holds another model"),
        ([*clip, "--checkpoint", folder / "clip.mp4"], "clip.mp4"),
        (["--batch_input_path", folder / "missing.jsonl"], "there is no file"),
    ):
        with pytest.raises(ValueError) as error:
            command.main(arguments(folder, "--video_save_folder", made, *more))
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert list(made.iterdir()) == []


def test_a_full_gpu_is_one_line_with_what_helps(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )

    monkeypatch.setattr(command, "configure_logging", lambda: None)
    monkeypatch.setattr(command, "load_pipeline", full)
    given = ["--input_image_or_video_path", folder / "clip.mp4", "--video_save_folder", tmp_path / "made"]
    with pytest.raises(ValueError) as error:
        command.main(arguments(folder, *given, "--offload_tokenizer", "--disable_guardrail"))
    assert str(error.value) == (
        "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB); what helps: "
        "--offload_diffusion_decoder, --offload_ar_model, --fp8, --num_gpus 2, fewer videos at once, or smaller ones"
    )
    shut_down()


def test_a_model_trained_in_fp8_is_generated_with_in_its_own_precision(tmp_path):
    config, file = RunConfig(), tmp_path / "config.yaml"
    config.precision.fp8, config.precision.fp8_first_last_bf16 = "tensorwise", [1, 1]
    file.write_text(to_yaml(config))
    adapted = command.adapted_config(SimpleNamespace(height=32, width=None), file)
    assert (adapted.precision.dtype, adapted.precision.fp8, adapted.data.height) == ("bf16", None, 32)


def test_what_cannot_be_written_in_the_end_is_one_line(folder, tmp_path):
    (tmp_path / "made.mp4").mkdir()
    result = command._Result(Item(folder / "clip.mp4", "made"), "made", None, None, None)
    args = SimpleNamespace(fps=None, video_save_folder=str(tmp_path))
    with pytest.raises(ValueError, match=f"made cannot be written to {tmp_path}: Is a directory"):
        command._write(args, result, torch.zeros(3, 2, 32, 48))
    assert [path.name for path in tmp_path.iterdir()] == ["made.mp4"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_refused(folder, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written to"):
        command.main(
            arguments(folder, "--input_image_or_video_path", folder / "clip.mp4", "--video_save_folder", tmp_path)
        )
