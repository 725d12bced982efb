"""Starting the processes of a run, and that they end together."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest

from cosmos_mcore.config import RunConfig
from cosmos_mcore.parallel import launch
from tests.processes import children_of, environment, processes_with, wait_until_gone

LAUNCHER = """
import faulthandler, sys
faulthandler.dump_traceback_later(50)  # before the test gives up
from cosmos_mcore.parallel import launch
if "stubborn" in sys.argv:
    launch._SECONDS_TO_END = 1
sys.exit(launch.run_processes(int(sys.argv[1]), sys.argv[2:]))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
from cosmos_mcore.parallel.launch import die_with_parent
die_with_parent()
mode, folder, rank = sys.argv[1], Path(sys.argv[2]), os.environ["RANK"]
if mode == "stubborn":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
(folder / rank).write_text(os.environ["WORLD_SIZE"] + " " + os.environ["OMP_NUM_THREADS"])
if mode == "fails" and rank == "1":
    sys.exit(3)
if mode == "is_killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode != "succeeds":
    time.sleep(60)
"""


def heed_signals():
    """As from a terminal: a shell's background job, with pytest in it, ignores SIGINT, and under nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Launched:
    """A launcher and its ranks, found by a mark in their environment."""

    def __init__(self, folder, count, mode, before=()):
        self.mark = uuid.uuid4().hex
        (folder / "rank.py").write_text(RANK)
        self.folder = folder / "written"
        self.folder.mkdir()
        self.temporary = folder / "temporary"
        self.temporary.mkdir()
        command = [*before, sys.executable, "-c", LAUNCHER, str(count), str(folder / "rank.py"), mode, str(self.folder)]
        env = environment(MARK=self.mark, TMPDIR=str(self.temporary))
        del env["OMP_NUM_THREADS"]
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, preexec_fn=heed_signals)

    def wait_for_ranks(self, count):
        deadline = time.monotonic() + 60
        while len(list(self.folder.iterdir())) < count:
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)

    def end(self):
        """The exit code and what was written to standard error; nothing may live on."""
        try:
            _, stderr = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired as error:
            self.process.kill()
            raise AssertionError(f"it does not end:\n{self.process.communicate()[1]}") from error
        assert wait_until_gone(self.mark) == []
        return self.process.returncode, stderr


@pytest.fixture
def launched(tmp_path):
    made = []

    def start(count, mode, *before):
        made.append(Launched(tmp_path, count, mode, before))
        return made[-1]

    yield start
    for one in made:
        for pid in processes_with(one.mark):
            os.kill(pid, signal.SIGKILL)


def test_ranks_know_their_place_and_share_the_cores(launched):
    run = launched(2, "succeeds")
    assert run.end() == (0, "")
    threads = max(1, os.cpu_count() // 2)
    assert {path.name: path.read_text() for path in run.folder.iterdir()} == dict.fromkeys("01", f"2 {threads}")
    assert list(run.temporary.iterdir()) == []


def test_the_launcher_may_be_process_1_of_a_container(launched):
    container = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc")
    try:
        subprocess.run([*container, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine does not let its users make process namespaces, so nothing can be process 1 here")
    assert launched(2, "succeeds", *container).end() == (0, "")


def test_a_rank_whose_launcher_is_gone_ends(monkeypatch):
    class Ended(Exception):
        pass

    def end(code):
        raise Ended

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: SimpleNamespace(prctl=lambda *arguments: 0))
    monkeypatch.setattr(os, "_exit", end)
    launch.die_with_parent()
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(launch, "_runs_this_python", lambda pid: False)
    with pytest.raises(Ended):
        launch.die_with_parent()


@pytest.mark.parametrize(("mode", "code"), [("fails", 3), ("is_killed", 128 + signal.SIGKILL)])
def test_a_rank_that_ends_badly_ends_all(launched, mode, code):
    run = launched(2, mode)
    found, stderr = run.end()
    assert found == code and list(run.temporary.iterdir()) == []
    assert re.fullmatch("error: rank . was killed by SIGKILL\n" if mode == "is_killed" else "", stderr)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_launcher_ends_all(launched, number):
    run = launched(2, "sleeps")
    run.wait_for_ranks(2)
    run.process.send_signal(number)
    code, _ = run.end()
    assert code == 128 + number and list(run.temporary.iterdir()) == []


def test_nohup_is_respected(launched):
    run = launched(2, "sleeps", "nohup")
    run.wait_for_ranks(2)
    run.process.send_signal(signal.SIGHUP)
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[0] == 128 + signal.SIGTERM


def test_ranks_that_do_not_end_are_killed(launched):
    run = launched(2, "stubborn")
    run.wait_for_ranks(2)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (128 + signal.SIGINT, "")


def test_a_signal_before_there_are_ranks_is_not_lost(launched):
    run = launched(2, "sleeps")
    while not handles(run.process.pid, signal.SIGTERM):
        assert run.process.poll() is None
        time.sleep(0.001)
    run.process.send_signal(signal.SIGTERM)
    code, _ = run.end()
    assert code == 128 + signal.SIGTERM and list(run.temporary.iterdir()) == []


def handles(pid, number):
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def test_no_rank_outlives_a_launcher_that_is_killed(launched):
    run = launched(2, "sleeps")
    run.wait_for_ranks(2)
    assert len(children_of(run.process.pid)) == 2
    run.process.kill()
    assert run.end()[0] == -signal.SIGKILL


@pytest.fixture
def config(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return RunConfig()


def test_as_many_processes_as_the_layout_needs(config, monkeypatch):
    assert launch.processes_to_start(config) == 0
    config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size = 2, 3
    assert launch.processes_to_start(config) == 6
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process
    assert launch.processes_to_start(config) == 6
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert launch.processes_to_start(config) == 0


def test_too_few_gpus_is_told_with_the_command_that_fits(config, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["examples/pretrain_cosmos_ar.py", "conf/x.yaml"])
    config.parallel.tensor_model_parallel_size = 8
    with pytest.raises(
        ValueError, match="needs 8 GPUs but this node has 4; on 2 nodes run: torchrun --nnodes 2"
    ) as caught:
        launch.processes_to_start(config)
    assert str(caught.value).endswith("examples/pretrain_cosmos_ar.py conf/x.yaml")


def test_rank_zero_speaks(config, monkeypatch):
    assert launch.is_rank_zero() and launch.world_size() == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not launch.is_rank_zero() and launch.world_size() == 2
