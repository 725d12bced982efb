"""Embedding before training: every prompt once, by any number of processes, and what it says."""

import logging
import shutil
import subprocess
import sys

import pytest
import torch

from cosmos_mcore.data.embed_prompts import main
from cosmos_mcore.text.cache import EmbeddingCache
from cosmos_mcore.text.encoder import TextEncoder
from tests.processes import ROOT, environment
from tests.text.models import write_tiny_t5

PROMPTS = {"a": "a robot arm lifts a box", "b": "rain", "c": "rain", "d": "the car turns left"}


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    return write_tiny_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture
def command(tmp_path, text_encoder):
    """The command line for four videos, one without a prompt; their contents do not matter."""
    (tmp_path / "videos").mkdir()
    for name, prompt in PROMPTS.items():
        (tmp_path / "videos" / f"{name}.mp4").touch()
        (tmp_path / "videos" / f"{name}.txt").write_text(prompt)
    (tmp_path / "videos" / "silent.mp4").touch()
    (tmp_path / "config.yaml").write_text(f"data: {{path: {tmp_path / 'videos'}, prompt_cache: {tmp_path / 'cache'}}}")
    return [str(tmp_path / "config.yaml"), "--text_encoder", str(text_encoder)]


def test_any_number_of_processes_and_again(command, tmp_path, text_encoder, capsys, monkeypatch):
    script = [sys.executable, "scripts/embed_prompts.py", *command, "--part", "1/2"]
    other = subprocess.Popen(script, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True)
    assert main([*command, "--part", "0/2"]) == 0
    stdout, _ = other.communicate(timeout=120)
    assert other.returncode == 0 and "part 1 of 2: 1 prompts embedded, 0 were there;" in stdout
    out = capsys.readouterr().out
    assert "part 0 of 2: 2 prompts embedded, 0 were there;" in out
    assert f"silent.mp4 has no prompt ({tmp_path / 'videos' / 'silent.txt'} does not exist)" in out
    assert "1 of the videos have no prompt; training will skip them" in out
    encoder = TextEncoder.from_folder(text_encoder, torch.device("cpu"))
    cache = EmbeddingCache(tmp_path / "cache", encoder.fingerprint)
    for prompt in PROMPTS.values():
        found = cache.read(prompt).float()
        assert torch.allclose(found, encoder([prompt])[0].float(), atol=0.05)
        assert not found[20:].any() and found[0].any()
    monkeypatch.setattr(TextEncoder, "from_folder", None)  # is not asked for again
    assert main(command) == 0
    assert "part 0 of 1: 0 prompts embedded, 3 were there;" in capsys.readouterr().out


def test_one_file_of_prompts_and_the_validation_videos(command, tmp_path, capsys):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "e.mp4").touch()
    lines = [f'{{"visual_input": "videos/{name}.mp4", "prompt": "{prompt}"}}' for name, prompt in PROMPTS.items()]
    lines.append('{"visual_input": "more/e.mp4", "prompt": "sun"}')
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    changes = [f"data.prompts={tmp_path / 'all.jsonl'}", f"data.validation_path={tmp_path / 'more'}"]
    assert main([*command, *changes]) == 0
    assert "4 prompts embedded, 0 were there" in capsys.readouterr().out
    assert "sun" in EmbeddingCache(tmp_path / "cache")


def test_mistakes(command, tmp_path, text_encoder):
    with pytest.raises(ValueError, match=r"there is no text encoder in .*nowhere \(config\.json is missing\)"):
        main([command[0], "--text_encoder", str(tmp_path / "nowhere")])
    for path in (tmp_path / "videos").glob("*.txt"):
        path.unlink()
    with pytest.raises(ValueError, match=r"none of the 5 videos has a prompt; the first, .*a\.mp4, has no prompt"):
        main(command)
    (tmp_path / "videos" / "a.txt").write_text("rain")
    assert main(command) == 0
    other = shutil.copytree(text_encoder, tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace("-9.0", "-8.0"))
    with pytest.raises(ValueError, match="were made by another text encoder"):
        main([command[0], "--text_encoder", str(other)])


@pytest.fixture(autouse=True)
def logging_as_it_was():
    yield
    ours = logging.getLogger("cosmos_mcore")
    ours.handlers, ours.propagate = [], True
