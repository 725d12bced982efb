"""What the command line prints without training, and when a GPU is full."""

import pytest
import torch

from cosmos_mcore.config import load_config
from cosmos_mcore.training import setup
from cosmos_mcore.training.main import main


def test_print_config_can_be_read_back(command, small_yaml, tmp_path):
    code, stdout, stderr = command(small_yaml, "optimizer.lr=0.25", "--print-config").finish()
    assert (code, stderr) == (0, "")
    (tmp_path / "printed.yaml").write_text(stdout)
    assert load_config(tmp_path / "printed.yaml") == load_config(small_yaml, ["optimizer.lr=0.25"])
    assert not (tmp_path / "out").exists()


def test_dry_run_of_four_processes_in_one(command, small_yaml, tmp_path):
    run = command(small_yaml, "--dry-run", "parallel.sequence_parallel=true", "parallel.pipeline_model_parallel_size=2")
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, "")
    lines = dict(line.split("  ", 1) for line in stdout.splitlines() if "  " in line)
    values = {name: value.strip() for name, value in lines.items()}
    assert values["latent shape (T, H, W)"] == "(3, 2, 3)"
    assert values["sequence length"] == "18 (padded to 18)"
    assert values["ignored first tokens"] == "5"
    assert values["loss positions / z-loss positions"] == "12 / 17"
    assert values["processes"] == "4 = TP 2 x PP 2 x CP 1 x DP 1"
    assert values["micro-batches per step"] == "2 of 2 clips"
    assert values["tokens per step"] == "72"
    assert values["clips"] == "24 (0 files skipped)"
    assert values["starts from"] == "new weights"
    layer = 32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 32 * 48 + 2 * 8 + 2 * 32
    assert values["parameters"].startswith(f"{2 * 64000 * 32 + 2 * layer + 32:,} (")
    assert not (tmp_path / "out").exists()


def test_dry_run_of_any_number_of_processes_finds_the_checkpoint_to_resume(command, small_yaml, uninterrupted):
    run = command(small_yaml, "--dry-run", output_root=uninterrupted.parents[2], WORLD_SIZE="4")
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, "")
    assert "4 = TP 2 x PP 1 x CP 1 x DP 2" in stdout
    assert f"resume from {uninterrupted / 'checkpoints' / 'iter_000000012'}" in stdout


@pytest.mark.parametrize("change", ["data.num_frames=41", "parallel.tensor_model_parallel_size=3"])
def test_dry_run_refuses_what_the_run_would(command, small_yaml, change):
    code, _, stderr = command(small_yaml, "--dry-run", change).finish()
    assert code == 2
    assert stderr.startswith("error: ") and stderr.count("\n") == 1


def test_a_full_gpu_names_what_helps(small_yaml, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path / "out"))

    def set_up(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 79.1 GiB")

    monkeypatch.setattr(setup, "set_up", set_up)
    monkeypatch.setattr("cosmos_mcore.training.main.configure_logging", lambda: None)  # of the tests' process
    one = ["parallel.tensor_model_parallel_size=1", "precision.dtype=bf16"]
    four_billion = ["hidden_size", "ffn_hidden_size", "num_layers", "num_attention_heads", "num_query_groups"]
    keys = [f"model.{name}=null" for name in (*four_billion, "kv_channels")]
    with pytest.raises(ValueError) as caught:
        main([str(small_yaml), "model.preset=4b", *keys, *one])
    text = str(caught.value)
    assert "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB); the run was estimated" in text
    assert "What helps, most first: precision.moments=bf16 (about 16 GB less); precision.main_grads=bf16" in text
    assert "\n" not in text
