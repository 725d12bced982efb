"""Two GPUs give the numbers of one: Transformer Engine in bf16 at the 4B's width, four layers, ten steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.gpu

TASK: dict[str, Any] = {
    "arch": {"num_layers": 4, "hidden_size": 4096},
    "height": 384,
    "width": 640,
    "frames": 33,
    "global_batch_size": 4,
    "distinct_batches": 2,
    "steps": 10,
    "lr": 1e-4,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"parallel.tensor_model_parallel_size": 2},
    "TP2+SP": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "PP2": {"parallel.pipeline_model_parallel_size": 2},
    "PP2 VPP2": {
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_model_parallel_size": 2,
    },
    "CP2": {"parallel.context_parallel_size": 2},
    "DP2": {"parallel.use_distributed_optimizer": False},
    "DP2 distributed optimizer, overlapped": {
        "parallel.overlap_grad_reduce": True,
        "parallel.overlap_param_gather": True,
    },
}


RESULTS = Path("outputs/gpu_layouts.jsonl")


def run_worker(processes: int, task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Results of all layouts of the task, by name."""
    worker = Path(__file__).with_name("layout_worker.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(worker)]
    done = subprocess.run([*command, json.dumps(task)], capture_output=True, text=True, timeout=900)
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    results = {result.pop("layout"): result for result in map(json.loads, lines)}
    assert results, done.stderr[-4000:]
    # For the verification card (docs/cards/README.md).
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(
            json.dumps({"processes": processes, "task": task, "results": results, "log": done.stderr[-2000:]}) + "\n"
        )
    return results


@pytest.fixture(scope="module")
def one_gpu() -> dict[str, Any]:
    """The reference."""
    return run_worker(1, {**TASK, "layouts": {"one": {}}})["one"]


@pytest.fixture(scope="module")
def two_gpus() -> dict[str, dict[str, Any]]:
    """All layouts in one start of two processes."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return run_worker(2, {**TASK, "layouts": LAYOUTS})


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_agree_with_one(name: str, one_gpu: dict[str, Any], two_gpus: dict[str, dict[str, Any]]) -> None:
    assert name in two_gpus, "the worker ended before this layout"
    got = two_gpus[name]
    assert got["losses"] == pytest.approx(one_gpu["losses"], rel=2e-3)
    assert got["grad_norms"] == pytest.approx(one_gpu["grad_norms"], rel=5e-3)  # 1e-3 where it was measured
    assert one_gpu["losses"][-1] < one_gpu["losses"][0] - 0.5, "nothing was learnt, so equal losses say little"
