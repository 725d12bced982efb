"""The benchmarks of training start, print what they promise, and refuse what they cannot measure."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

SMALL = [
    str(ROOT / "conf/tiny_cpu.yaml"), "parallel.tensor_model_parallel_size=1", "model.num_layers=1",
    "training.global_batch_size=2", "training.micro_batch_size=1",
]  # fmt: skip


def run(script, *arguments):
    command = [sys.executable, f"benchmarks/{script}.py", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=ROOT, env=environment(), check=False
    )


def test_train_step_prints_one_line_of_json():
    done = run("train_step", *SMALL, "--steps", 2, "--warmup", 0)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["ms_per_step"] > 0 and figures["optimizer_ms"] > 0 and figures["forward_backward_ms"] > 0
    assert figures["tokens_per_second_per_gpu"] == pytest.approx(2 * 160 / figures["ms_per_step"] * 1e3, rel=0.01)
    assert figures["processes"] == 1 and figures["versions"]["torch"] and figures["commit"]


def test_profile_step_prints_the_costliest_operators_and_writes_a_trace(tmp_path):
    done = run("profile_step", *SMALL, "--top", 3, "--trace", tmp_path / "step.json")
    assert done.returncode == 0, done.stderr
    *rows, total = done.stdout.splitlines()[-4:]
    assert len(rows) == 3 and all("aten::" in row and "%" in row for row in rows) and "of kernels per step" in total
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["precision.fp8=foo"], "precision.fp8='foo' must be one of"),
        (["parallel.tensor_model_parallel_size=3"], "does not divide the model's 2 query groups; try 2"),
        (["--steps", "1"], "--steps=1 must be at least 2"),
        (["training.global_batch_size=3"], "must be a multiple of micro_batch_size=1 x 2 data-parallel replicas"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(arguments, error, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("WORLD_SIZE", "2" if "global" in arguments[0] else "1")
    from train_step import main

    with pytest.raises(ValueError, match=error):
        main([*SMALL, *arguments])
