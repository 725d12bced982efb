"""A rank that fails or vanishes ends all ranks, also those that no launcher of its own node watches."""

import subprocess
import sys
import time

import pytest

from tests.processes import ROOT, environment, free_port


def start(mode, ranks):
    port = str(free_port())
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": "1"}
        env = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, "-m", "tests.parallel.watchdog_worker", mode]
        yield subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("mode", "codes", "reason"),
    [
        ("silent", [1, -9], "rank 1 gives no sign of life"),
        ("failed", [1, 1], "rank 1 has failed"),
        ("finished", [0, 0], ""),
    ],
)
def test_all_ranks_end_together(mode, codes, reason):
    processes = list(start(mode, 2))
    began = time.monotonic()
    outputs = [process.communicate(timeout=55)[1] for process in processes]
    assert [process.returncode for process in processes] == codes, outputs
    assert time.monotonic() - began < 50
    if reason:
        assert f"rank 0 ends: {reason}" in outputs[0]


def test_a_rank_0_that_is_frozen_ends_the_others():
    processes = list(start("frozen", 2))
    try:
        stderr = processes[1].communicate(timeout=55)[1]
    finally:
        for process in processes:  # the first as a machine that is lost: it closes no connection
            process.kill()
            process.wait()
    assert processes[1].returncode == 1, stderr
    assert "rank 1 ends: rank 0 does not answer" in stderr
