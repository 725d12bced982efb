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
    *rows, line = done.stdout.splitlines()[-4:]
    assert len(rows) == 3 and all("aten::" in row and "%" in row for row in rows)
    sums = json.loads(line)
    assert sums["kernels_ms"] > 0 and sums["kinds"] > 3 and sums["communication_ms"] == 0
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


def test_scaling_measures_layouts_one_by_one(tmp_path):
    file = tmp_path / "scaling.json"
    numbers = {"tokens_per_second_per_gpu": 1, "processes": 8, "ms_per_step": 1.0, "communication_ms": 3.0,
               "exposed_communication_ms": 2.0, "peak_memory_gb": 20.0, "planned_memory_gb": 21.0}  # fmt: skip
    file.write_text(json.dumps({"tiny:dp8": numbers}))
    small = [
        "model.num_layers=1", "data.height=64", "data.width=128", "tokenizer.name=haar", "tokenizer.path=null",
        "precision.fp8=null", *(f"precision.{name}=fp32" for name in ("dtype", "main_grads", "moments")),
    ]  # fmt: skip
    done = run("scaling", file, "--layouts", "tiny:tp3", "tiny:dp1", "--clips", 1, "--steps", 2, *small)
    assert done.returncode == 1, done.stderr
    results = json.loads(file.read_text())
    assert list(results) == ["tiny:dp8", "tiny:tp3", "tiny:dp1"]
    assert "does not divide the model's 2 query groups" in results["tiny:tp3"]["error"]
    assert results["tiny:dp1"]["planned_memory_gb"] > 0 and results["tiny:dp1"]["kernels_ms"] > 0
    share = 1 / results["tiny:dp1"]["tokens_per_second_per_gpu"]
    assert f"| tiny:dp8 | 8 | 1 | 1 | {share:.1%} | 3, 2 ms | 20.0 GB | 21.0 GB (+5%) |" in done.stdout
    assert "| 100.0% |" in done.stdout.splitlines()[-1]
    again = run("scaling", file)
    assert again.returncode == 0 and again.stdout == done.stdout


def test_scaling_reads_layouts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from scaling import keys_of

    keys = keys_of("12b:tp2pp4", 4)
    assert {"model.preset=12b", "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=4",
            "parallel.sequence_parallel=true", "training.global_batch_size=32"} <= set(keys)  # fmt: skip
    for wrong in ("4b", "4b:", "4b:tp0", "4b:tp2x", "4b:2tp"):
        with pytest.raises(ValueError, match="is no layout"):
            keys_of(wrong, 4)


def test_exposed_communication(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from profile_step import communication

    spans = [
        ("gemm", 0, 10), ("ncclDevKernel_AllGather", 5, 15), ("ncclDevKernel_ReduceScatter", 12, 20), ("norm", 18, 25),
        ("ncclDevKernel_Send", 30, 33), ("copy", 31, 32),
    ]  # fmt: skip
    assert communication(spans[::-1]) == (10 + 8 + 3, (18 - 10) + 2)


def test_tiles_are_changed_for_what_is_faster_twice(monkeypatch):
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs only")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from decode_tiles import choose

    used, lucky = [], iter([10.0, 10.0, 20.0, 8.0, 9.0, 10.0, 10.0])

    def measure():
        return [{"slow": 12.0, "fast": 9.0}.get(used[-1]) or next(lucky), 5.0]

    results = choose(["first", "slow", "fast"], used.append, measure)
    assert [setting for _, setting, _ in results] == ["fast", "first", "slow"] and used[-1] == "fast"
    assert results[0] == (0.95, "fast", [9.0, 5.0])
    used.clear()
    lucky = iter([10.0, 10.0, 8.0, 10.0, 10.0])  # in use; in use and another, once; in use and the other, once more
    assert choose(["first", "other"], used.append, lambda: [next(lucky)])[0][1] == "other"
    assert used[-1] == "first"
