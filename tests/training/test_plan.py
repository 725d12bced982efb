"""Estimates of memory and time against what GPUs have shown, and the choice of layouts."""

import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_mcore.config import load_config
from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.training.plan import (
    clip_of_tokens,
    estimate_memory,
    estimate_step_seconds,
    keys_that_save_memory,
    parse_gpus,
    plans,
)

ROOT = Path(__file__).parents[2]
LEAN = ["precision.main_grads=bf16", "precision.moments=bf16"]
TWO_CLIPS = ["training.global_batch_size=2", "training.micro_batch_size=2"]
LARGE = ["data.height=640", "data.width=848"]
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]

# Peak GB and ms per step from the cards in docs/cards (train_step_*.yaml).
MEASURED = {
    "fp8, 4,800 tokens": (["precision.fp8=delayed"], 1, 59.05, 175.9),
    "fp8, 2 x 4,800 tokens": (["precision.fp8=delayed", *TWO_CLIPS], 1, 69.94, 312.4),
    "fp8, 10,624 tokens": (["precision.fp8=delayed", *LARGE], 1, 72.24, 397.9),
    "bf16, 2 x 4,800 tokens": (TWO_CLIPS, 1, 65.80, 434.7),
    "fp8, 10,624 tokens, TP2": (["precision.fp8=delayed", *LARGE, *TP2], 2, 36.32, 220.8),
    "12b, fp8, recomputed": (
        ["precision.fp8=delayed", "model.preset=12b", "data.height=640", "data.width=1024",
         "parallel.recompute_granularity=full"], 1, 124.73, 1719.7,
    ),
}  # fmt: skip


def config(*keys):
    return load_config(ROOT / "conf/teal_tp1.yaml", [*LEAN, *keys])


@pytest.mark.parametrize("case", MEASURED)
def test_estimates_are_what_gpus_have_shown(case):
    keys, gpus, gigabytes, milliseconds = MEASURED[case]
    memory = estimate_memory(config(*keys), gpus)
    assert memory.peak / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert memory.needed > memory.peak
    assert estimate_step_seconds(config(*keys), gpus) * 1e3 == pytest.approx(milliseconds, rel=0.1)


def test_plans_fit_and_come_fastest_first():
    found = plans(config("model.preset=12b", "precision.fp8=delayed", "training.global_batch_size=32"), 8, 80 * 2**30)
    assert len(found) > 5
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    assert all(plan.memory.needed <= 80 * 2**30 for plan in found)
    assert not plans(config("model.preset=12b", "precision.fp8=delayed"), 1, 80 * 2**30)


def test_more_gpus_per_replica_hold_less():
    peaks = []
    for size in (1, 2, 4, 8):
        run = config(f"parallel.tensor_model_parallel_size={size}")
        run.parallel.sequence_parallel = size > 1
        peaks.append(estimate_memory(run, size).peak)
    assert peaks == sorted(peaks, reverse=True)


def test_keys_that_save_memory_name_what_is_not_set_yet():
    plain = load_config(ROOT / "conf/teal_tp1.yaml", ["precision.main_grads=fp32", "precision.moments=fp32"])
    assert keys_that_save_memory(plain, 1)[0].startswith("precision.moments=bf16 (about 16 GB less)")
    lean = keys_that_save_memory(config("parallel.recompute_granularity=full"), 1)
    assert lean == ["a larger parallel.tensor_model_parallel_size with parallel.sequence_parallel=true, on more GPUs"]


@pytest.mark.parametrize("tokens", [1000, 4800, 10600, 12800])
def test_a_clip_of_about_so_many_tokens(tokens):
    run = config()
    run.data.height, run.data.width = clip_of_tokens(tokens)
    assert derive_video_layout(run).sequence_length == pytest.approx(tokens, rel=0.1)


def test_gpus():
    assert parse_gpus("8x80G") == (8, 80 * 2**30)
    with pytest.raises(ValueError, match="--gpus=80G must be a count and the memory of each GPU, for example 8x80G"):
        parse_gpus("80G")


def test_command():
    command = [sys.executable, ROOT / "scripts/plan.py", "--gpus", "4x80G", "--model", "4b", "--tokens", "10600"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and not result.stderr
    assert "fastest: parallel.tensor_model_parallel_size=" in result.stdout
    result = subprocess.run([*command[:5], "5b"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "error: model.preset=5b is unknown" in result.stderr
