"""What the command line prints without training."""

import pytest

from cosmos_mcore.config import load_config


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
