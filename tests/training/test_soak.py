"""What weeks do to a run, in minutes: kills at random moments, and thousands of steps."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from cosmos_mcore.checkpoint.pointer import iteration_of, latest_checkpoint
from cosmos_mcore.training.stopping import CONTINUE, STOPPED
from tests.processes import children_of, processes_with

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

KILLS = 20
LENGTH = 400  # steps of the interrupted run: more than the kills can reach
CHANGES = (f"training.train_iters={LENGTH}", "checkpoint.save_interval=3", "checkpoint.keep=2")


def launcher(number):
    return lambda run: os.kill(run.process.pid, number)


def one_rank(number):
    return lambda run: os.kill(random.choice(children_of(run.process.pid)), number)


def stop_file(run):
    (run.folder / "stop").touch()


WAYS = [
    (launcher(signal.SIGTERM), CONTINUE),
    (one_rank(signal.SIGTERM), CONTINUE),
    (one_rank(signal.SIGUSR1), CONTINUE),
    (stop_file, STOPPED),
    (launcher(signal.SIGKILL), -signal.SIGKILL),
    (one_rank(signal.SIGKILL), 128 + signal.SIGKILL),
]


def curve_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def saving(run):
    return any((run.folder / "checkpoints").glob("*.incomplete"))


def newest(run):
    path = latest_checkpoint(run.folder / "checkpoints")  # raises if what is named is not complete
    return 0 if path is None else iteration_of(path)


def test_twenty_kills_at_random_moments(command, small_yaml, tmp_path):
    seed = time.time_ns()
    print("seed", seed)
    random.seed(seed)
    reached, during_saves = 0, 0
    for number in range(KILLS):
        stop, code = WAYS[number % len(WAYS)]
        run = command(small_yaml, *CHANGES)
        before = newest(run)
        seen = len(run.metrics())
        run.wait_for(lambda run=run, seen=seen: len(run.metrics()) not in (seen, 0))
        if number % 2:
            run.wait_for(lambda run=run: saving(run))
            during_saves += 1
        time.sleep(random.random() * 0.5)
        complete = newest(run)
        stop(run)
        found, _, stderr = run.finish()
        assert found == code, (number, stderr)
        assert newest(run) >= complete >= before, "the newest complete checkpoint is lost"
        if code in (CONTINUE, STOPPED):
            assert newest(run) == run.metrics()[-1]["iteration"]
        reached = newest(run)
        print(f"kill {number + 1}: code {code}, checkpoint {reached}")
    steps = reached + 3
    last = command(small_yaml, *CHANGES[1:], f"training.train_iters={steps}").finish()
    assert last[0] == 0, last[2]
    whole = command(small_yaml, *CHANGES[1:], f"training.train_iters={steps}", output_root=tmp_path / "whole")
    assert whole.finish()[0] == 0
    curve, expected = curve_of(run.folder), curve_of(whole.folder)
    assert [record["iteration"] for record in curve] == list(range(1, steps + 1))
    for name in ("consumed samples", "learning rate"):  # each step has its own samples: none twice, none missed
        assert [record[name] for record in curve] == [record[name] for record in expected]
    assert [record["lm loss"] for record in curve] == pytest.approx([r["lm loss"] for r in expected], rel=1e-5)
    print(f"{KILLS} kills, {during_saves} of them during saves, {steps} steps, one curve")


def usage(pid):
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(re.search(rf"{name}:\s+(\d+)", status).group(1)) for name in ("VmRSS", "Threads"))
    return memory / 1024, len(os.listdir(f"/proc/{pid}/fd")), threads


def test_five_thousand_steps(command, small_yaml):
    changes = ("training.train_iters=5000", "checkpoint.save_interval=250", "checkpoint.keep=2")
    run = command(small_yaml, *changes, "parallel.tensor_model_parallel_size=1", "training.global_batch_size=1",
                  "training.micro_batch_size=1")  # fmt: skip
    samples = []
    for steps in range(500, 5000, 500):
        run.wait_for(lambda steps=steps: len(run.metrics()) >= steps, seconds=1800)
        (pid,) = processes_with(run.mark)
        samples.append(usage(pid))
        print(f"step {steps}: {samples[-1][0]:.0f} MiB, {samples[-1][1]} files, {samples[-1][2]} threads")
    assert run.finish()[0] == 0
    memory, files, threads = zip(*samples[1:], strict=True)
    assert max(memory[4:]) < 1.05 * max(memory[:4])
    assert max(files) - min(files) <= 4 and max(threads) - min(threads) <= 4  # a save has some while it lasts
