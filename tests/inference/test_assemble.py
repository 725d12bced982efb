"""Which config a checkpoint stands for."""

from pathlib import Path

import pytest
import torch

from cosmos_mcore.config import RunConfig, derive_video_layout, validate
from cosmos_mcore.inference.assemble import (
    check_tokenizer,
    find_run_config,
    load_pipeline,
    released_config,
    share_over_processes,
)
from cosmos_mcore.model.presets import resolve_arch
from tests.inference.models import NO_GROUP


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("run", "run"),
        ("run/checkpoints", "run"),
        ("run/checkpoints/iter_000000010", "run"),
        ("run/checkpoints/iter_000000010.pt", "run"),
        ("checkpoints/mine", "checkpoints/mine"),
        ("checkpoints/mine/model.pt", "checkpoints/mine"),
        ("checkpoints/released", None),
        ("checkpoints/released/model.pt", None),
    ],
)
def test_the_config_of_a_checkpoint(tmp_path, checkpoint, expected):
    for folder in ("run/checkpoints/iter_000000010", "checkpoints/mine", "checkpoints/released"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("run/config.yaml", "checkpoints/mine/config.yaml", "config.yaml"):
        (tmp_path / file).touch()
    found = find_run_config(tmp_path / checkpoint)
    assert found == (None if expected is None else tmp_path / expected / "config.yaml")


def test_released_models_make_the_original_s_clips(tmp_path):
    config = released_config(tmp_path)
    validate(config)
    layout = derive_video_layout(config)
    assert layout.latent_shape == (5, 40, 64)
    assert layout.num_tokens == 12800
    assert config.tokenizer.path == str(tmp_path / "Cosmos-Tokenize1-DV8x16x16-720p")


def test_a_tokenizer_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = RunConfig()
    config.tokenizer.name, config.tokenizer.path = "dv8x16x16", "~/tokenizer"
    (tmp_path / "tokenizer").mkdir()
    for file in ("decoder.jit", "encoder.jit"):
        with pytest.raises(ValueError, match="no tokenizer in ~/tokenizer; .* set tokenizer.path in run.yaml"):
            check_tokenizer(config, Path("run.yaml"))
        (tmp_path / "tokenizer" / file).touch()
    check_tokenizer(config, Path("run.yaml"))


def test_any_training_layout_becomes_tensor_parallelism():
    config = RunConfig()
    config.parallel.pipeline_model_parallel_size = 2
    config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel = 2, True
    shared = share_over_processes(config, 4).parallel
    assert (shared.tensor_model_parallel_size, shared.pipeline_model_parallel_size) == (4, 1)
    assert not shared.sequence_parallel


def test_eight_bits_are_refused_where_the_gpu_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    config = RunConfig()
    with pytest.raises(
        ValueError, match=r"--fp8 needs a GPU of compute capability 8\.9 or newer, which an A100 is not"
    ):
        load_pipeline(config, resolve_arch(config.model), tmp_path, torch.device("cuda"), NO_GROUP, fp8=True)
