"""The kernels of the decode step, in Triton's interpreter (tests/gpu has them on a GPU)."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT, environment


def test_kernels_compute_what_torch_does():
    pytest.importorskip("triton", reason="Triton comes with torch for GPUs")
    command = [sys.executable, "-W", "ignore", "-m", "tests.inference.triton_worker"]
    interpreted = environment(TRITON_INTERPRET="1")
    done = subprocess.run(command, cwd=ROOT, env=interpreted, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) > 55
    assert {name: value for name, value in results.items() if value > 2e-5} == {}
