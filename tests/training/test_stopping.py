"""Every way to stop a run: it ends its step, saves, exits with a code that says more than success, and can go on."""

import json
import os
import signal
import time
from functools import partial

import pytest

from cosmos_mcore.checkpoint.pointer import iteration_of, latest_checkpoint
from cosmos_mcore.training.stopping import (
    CONTINUE,
    STOPPED,
    Reason,
    StopRequests,
    read_exit_code,
    write_exit_code,
)
from tests.processes import children_of

LONG = ("training.train_iters=100000", "checkpoint.save_interval=100000")


def launcher_sigterm(run):
    os.kill(run.process.pid, signal.SIGTERM)


def one_rank_sigusr1(run):
    os.kill(children_of(run.process.pid)[1], signal.SIGUSR1)


def stop_file(run):
    (run.folder / "stop").touch()


def passed(run, iteration):
    return len(run.metrics()) > iteration


def test_a_run_that_is_stopped_again_and_again_trains_one_curve(command, small_yaml, uninterrupted):
    done = 0
    for stop, code in ((launcher_sigterm, CONTINUE), (one_rank_sigusr1, CONTINUE), (stop_file, STOPPED)):
        run = command(small_yaml, *LONG)
        run.wait_for(partial(passed, run, done + 5))
        stop(run)
        found, stdout, stderr = run.finish()
        assert (found, stderr) == (code, ""), stop
        assert read_exit_code(run.folder) == code and not (run.folder / "stop").exists()
        done, before = run.metrics()[-1]["iteration"], done
        assert done > before
        assert iteration_of(latest_checkpoint(run.folder / "checkpoints")) == done
        assert f"after iteration {done}; everything is saved" in stdout
    curve = run.metrics()
    assert [record["iteration"] for record in curve] == list(range(1, done + 1))
    expected = [json.loads(line)["lm loss"] for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [record["lm loss"] for record in curve[: len(expected)]] == pytest.approx(expected, rel=1e-5)
    assert [record["consumed samples"] for record in curve] == [4 * i for i in range(1, done + 1)]


@pytest.fixture
def requests(tmp_path):
    return StopRequests(tmp_path, minutes=None)


def test_signals(requests):
    before = signal.getsignal(signal.SIGUSR1)
    with requests.listening():
        assert requests.poll() is Reason.NONE
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.poll() is Reason.SIGUSR1 and requests.poll().exit_code == CONTINUE
        os.kill(os.getpid(), signal.SIGTERM)
        assert requests.poll().exit_code == CONTINUE
        os.kill(os.getpid(), signal.SIGUSR2)
        assert requests.poll().exit_code == STOPPED
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize(("text", "code"), [("", STOPPED), ("requeue\n", CONTINUE)])
def test_stop_file(requests, tmp_path, text, code):
    (tmp_path / "stop").write_text(text)
    assert requests.poll().exit_code == code
    requests.used_up()
    assert not (tmp_path / "stop").exists()


def test_time_budget(tmp_path):
    requests = StopRequests(tmp_path, minutes=0.001)
    assert requests.poll() is Reason.NONE
    time.sleep(0.07)
    assert requests.poll() is Reason.TIME and requests.poll().exit_code == CONTINUE


def test_exit_code_file(tmp_path):
    assert read_exit_code(tmp_path) == 0
    write_exit_code(tmp_path, CONTINUE)
    assert (tmp_path / "exit_code").read_text() == "75\n"
    write_exit_code(tmp_path, None)
    assert not (tmp_path / "exit_code").exists()
