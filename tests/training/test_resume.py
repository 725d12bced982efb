"""A run that is killed goes on with the same numbers, and a save that is interrupted destroys nothing."""

import json
import os
import random
import re
import signal
import time

import pytest

from cosmos_mcore.checkpoint.distributed import latest_checkpoint
from tests.processes import children_of

TRAIN_ITERS = 12


def curve_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_uninterrupted_run_has_all_its_files(uninterrupted):
    assert [record["iteration"] for record in curve_of(uninterrupted)] == list(range(1, TRAIN_ITERS + 1))
    checkpoints = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert checkpoints == ["iter_000000004", "iter_000000008", "iter_000000012", "latest_checkpoint.txt"]
    assert (uninterrupted / "checkpoints" / "latest_checkpoint.txt").read_text() == "iter_000000012\n"
    assert list((uninterrupted / "tensorboard").iterdir())
    assert "kv_channels: 8" in (uninterrupted / "config.yaml").read_text()


def test_it_learns(uninterrupted):
    losses = [record["lm loss"] for record in curve_of(uninterrupted)]
    assert losses[-1] < 0.95 * losses[0]


def kill_launcher(run, draw):
    """At a random moment soon after the first checkpoint is complete."""
    run.wait_for(lambda: latest_checkpoint(run.folder / "checkpoints"))
    time.sleep(draw.random() * 0.1)
    run.process.kill()


def kill_one_rank(run, draw):
    run.wait_for(lambda: latest_checkpoint(run.folder / "checkpoints"))
    os.kill(draw.choice(children_of(run.process.pid)), signal.SIGKILL)


def kill_during_a_save(run, draw):
    folder = run.folder / "checkpoints"
    run.wait_for(lambda: (folder / "iter_000000004").exists())
    run.wait_for(lambda: (folder / "iter_000000008.incomplete").exists())
    time.sleep(draw.random() * 0.05)  # training goes on beside the save, and must not get to its end
    run.process.kill()


@pytest.mark.parametrize(
    ("kill", "code"),
    [(kill_launcher, -signal.SIGKILL), (kill_one_rank, 128 + signal.SIGKILL), (kill_during_a_save, -signal.SIGKILL)],
)
def test_a_killed_run_continues_the_same_curve(kill, code, command, small_yaml, uninterrupted):
    seed = time.time_ns()
    print("seed", seed)  # shown when the test fails
    run = command(small_yaml)
    kill(run, random.Random(seed))
    found, _, stderr = run.finish()
    assert found == code, stderr
    assert stderr == "" or re.fullmatch("error: rank . was killed by SIGKILL\n", stderr)
    complete = latest_checkpoint(run.folder / "checkpoints")  # raises if what is named is not complete
    done = int(complete.name.rpartition("_")[2])
    assert done < TRAIN_ITERS - 3

    found, stdout, stderr = command(small_yaml).finish()
    assert (found, stderr) == (0, "")
    assert f"resuming from {complete}" in stdout
    expected, curve = curve_of(uninterrupted), curve_of(run.folder)
    assert [record["iteration"] for record in curve] == list(range(1, TRAIN_ITERS + 1))
    assert [record["iteration"] for record in curve if "resumed from" in record] == [done + 1]
    assert curve[done]["resumed from"] == done
    for name, tolerance in (("lm loss", 1e-5), ("z loss", 1e-5), ("grad norm", 1e-4)):
        assert [record[name] for record in curve] == pytest.approx([record[name] for record in expected], rel=tolerance)
    for name in ("consumed samples", "learning rate"):
        assert [record[name] for record in curve] == [record[name] for record in expected]
    assert not list((run.folder / "checkpoints").glob("*.incomplete"))
    assert latest_checkpoint(run.folder / "checkpoints").name == "iter_000000012"


def test_a_finished_run_does_nothing(command, small_yaml, uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_text()
    root = uninterrupted.parents[2]
    code, stdout, stderr = command(small_yaml, output_root=root).finish()
    assert (code, stderr) == (0, "")
    assert "nothing to do: 12 of 12 iterations are done" in stdout
    assert (uninterrupted / "metrics.jsonl").read_text() == before
