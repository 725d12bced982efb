"""Checks before a run, and the numbers that follow from its config."""

import json
import os

import pytest

from cosmos_mcore.config import load_config
from cosmos_mcore.data.token_cache import clip_settings
from cosmos_mcore.training.preflight import derived_numbers, preflight, processes


@pytest.fixture(autouse=True)
def output_root(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "out"))
    return tmp_path / "out"


@pytest.fixture
def config(small_yaml):
    return load_config(small_yaml)


def refused(config, world_size=1):
    with pytest.raises(ValueError) as caught:
        preflight(config, world_size)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_good_config_passes_and_nothing_is_written(config, output_root):
    for world_size in (1, 2, 4):
        preflight(config, world_size)
    assert not output_root.exists()


def test_one_process_stands_for_as_many_as_the_layout_needs(config):
    assert processes(config, 1) == 2
    assert processes(config, 2) == 2
    assert processes(config, 8) == 8
    assert "needs a multiple of 2 processes, but there are 3" in refused(config, 3)


def test_the_batch_must_suit_the_replicas(config):
    assert "must be a multiple of micro_batch_size=2 x 4 data-parallel replicas" in refused(config, 8)


def test_ranks_to_profile_are_there(config):
    config.logging.profile_ranks = [0, 2]
    preflight(config, 2)
    config.logging.profile_step_start, config.logging.profile_step_end = 1, 2
    assert "logging.profile_ranks=[0, 2]: there is no rank 2 in a run of 2 processes" in refused(config, 2)
    preflight(config, 4)


def test_a_clip_needs_frames_to_learn(config):
    config.model.num_condition_latents = 3
    assert "num_condition_latents=3" in refused(config)


def test_paths(config, tmp_path, output_root):
    config.data.path = str(tmp_path)
    assert "holds no .mp4 file" in refused(config)
    config.data.path = str(tmp_path / "nowhere")
    assert "does not exist" in refused(config)


def test_checkpoint_to_load(config, tmp_path, output_root):
    config.checkpoint.load = str(tmp_path / "model.pt")
    assert "model.pt does not exist" in refused(config)
    # A run that resumes from its own checkpoint does not read it any more.
    folder = output_root / "tests" / "small" / "run" / "checkpoints"
    (folder / "iter_000000004").mkdir(parents=True)
    (folder / "iter_000000004" / "metadata.json").write_text("{}")
    (folder / "latest_checkpoint.txt").write_text("iter_000000004\n")
    preflight(config, 1)


def test_output_folder(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "file" / "deeper"))
    assert "is not a writable folder; set OUTPUT_ROOT" in refused(config)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_that_is_read_only(config, tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "locked"))
    assert "is not a writable folder" in refused(config)


def test_derived_numbers_follow_the_config(config):
    def row(name):
        (line,) = (line for line in derived_numbers(config, 4).splitlines() if line.startswith(name))
        return line.split("  ")[-1].strip()

    assert row("processes") == "4 = TP 2 x PP 1 x CP 1 x DP 2"
    assert row("micro-batches") == "1 of 2 clips"
    assert row("tokens per step") == "72"
    config.data.height, config.data.num_frames = 64, 33
    assert row("latent shape") == "(5, 4, 3)"
    assert row("tokens per step") == "240"
    config.parallel.sequence_parallel, config.data.height = True, 48
    assert row("sequence length") == "45 (padded to 46)"


def test_tokenizer_files(config, tmp_path):
    config.tokenizer.name, config.tokenizer.path = "dv8x16x16", str(tmp_path / "t")
    assert f"tokenizer.path={tmp_path / 't'} has no encoder.jit; download it with" in refused(config)
    (tmp_path / "t").mkdir()
    for name in ("encoder.jit", "decoder.jit"):
        (tmp_path / "t" / name).touch()
    preflight(config, 1)


def test_a_token_cache_in_the_place_of_videos(config, tmp_path):
    (tmp_path / "token_cache.json").write_text(json.dumps(clip_settings(config.data)))
    config.data.path = config.data.token_cache = str(tmp_path)
    preflight(config, 1)
    config.data.frame_stride += 1
    assert "was made with data.frame_stride=1, this run has data.frame_stride=2" in refused(config)


@pytest.mark.parametrize("key", ["data.path", "data.token_cache", "data.validation_path", "checkpoint.load"])
def test_a_home_folder_that_is_unknown(small_yaml, key):
    assert "~nosuchuser/x: no home folder is known for it" in refused(load_config(small_yaml, [f"{key}=~nosuchuser/x"]))


def test_paths_in_the_home_folder(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config.checkpoint.load = "~/weights"
    assert "checkpoint.load=~/weights does not exist" in refused(config)
    (tmp_path / "weights").mkdir()
    preflight(config, 1)
