"""Converted checkpoints in the real, parallel model, and what that model saves converted back."""

import json

import pytest
import torch

from cosmos_mcore.checkpoint.convert import convert
from cosmos_mcore.checkpoint.names import entries
from cosmos_mcore.checkpoint.reader import EXP_AVG
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.checkpoint.training_files import write_original
from tests.processes import run_ranks


@pytest.mark.layouts
def test_tp2_pp2(tmp_path):
    arch = reduced("13b-video2world")
    weights = random_weights(arch)
    model = save_model(tmp_path / "model.pt", weights)
    convert(model, tmp_path / "converted", "distributed", tensor_parallel_size=2, pipeline_parallel_size=2)
    trained = write_original(tmp_path / "run", arch, tensor_parallel_size=4)
    convert(tmp_path / "run", tmp_path / "resume", "distributed")

    run_ranks("tests.checkpoint.real_model_worker", 4, 2, 2, tmp_path)

    names = {name for file in tmp_path.glob("names_*.json") for name in json.loads(file.read_text())}
    assert names == {entry.ours for entry in entries(arch)}
    saved = open_checkpoint(tmp_path / "saved")
    assert saved.layout == "distributed"
    assert all(torch.equal(saved.read(name), tensor) for name, tensor in weights.items())
    assert saved.training is not None and saved.training.iteration == saved.training.step == 1
    assert all(torch.all(saved.read(name, EXP_AVG) > 0) for name in saved.names)
    convert(model, tmp_path / "one.pt", "monolithic")
    convert(tmp_path / "saved", tmp_path / "other.pt", "monolithic")
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "other.pt").read_bytes()

    resumed = open_checkpoint(tmp_path / "resumed")
    assert resumed.training is not None and resumed.training.iteration == resumed.training.step == 3
    assert resumed.training.param_group["betas"] == (0.9, 0.999)  # the config's, not the checkpoint's
    for state, tensors in trained.items():
        assert all(
            torch.equal(resumed.read(name, state), tensor.to(resumed.dtype(name, state)))
            for name, tensor in tensors.items()
        )
