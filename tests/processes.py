"""Real processes for tests: ranks that talk through gloo, and whether a command has left any behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).parents[1]


def environment(**changes: str) -> dict[str, str]:
    """The environment of a child that finds the package and uses one thread; nothing of a launcher around pytest."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **changes}


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_ranks(module: str, world_size: int, *arguments: object, timeout: float = 240) -> None:
    """Runs ``python -m module ARGUMENTS`` as ``world_size`` ranks: what torchrun does, without its seconds of start.

    When one rank fails or the time is over, all are killed and the test fails with what they wrote.
    """
    port, ranks = free_port(), []
    command = [sys.executable, "-m", "tests.rank", module, *map(str, arguments)]
    deadline = time.monotonic() + timeout
    with TemporaryFile() as output:
        try:
            for rank in range(world_size):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                env = environment(**place)
                ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT))
            while any(rank.poll() is None for rank in ranks) and not any(rank.returncode for rank in ranks):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            codes = [rank.poll() for rank in ranks]
            for rank in ranks:
                rank.kill()
                rank.wait()
        if any(code != 0 for code in codes):
            output.seek(0)
            raise AssertionError(f"{module} ended with {codes}:\n{output.read().decode()[-6000:]}")


def processes_with(mark: str) -> list[int]:
    """Living processes that have ``mark`` in their environment, found even where their parents are gone."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass  # gone meanwhile, or another user's
    return found


def children_of(pid: int) -> list[int]:
    """Process ids of the direct children."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until_gone(mark: str, seconds: float = 10) -> list[int]:
    """The processes with ``mark`` that still live after ``seconds``; empty as soon as there are none."""
    deadline = time.monotonic() + seconds
    while (alive := processes_with(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive
