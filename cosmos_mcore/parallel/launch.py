"""Starts the processes of a run where the user did not use torchrun, and ends them together."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

import psutil

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.parallel.imports import lasting_imports
from cosmos_mcore.parallel.layout import model_parallel_size

logger = logging.getLogger(__name__)

_REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a rank decides what to do
_ENDS = (signal.SIGINT, signal.SIGHUP)  # a rank ends at once
_SECONDS_TO_END = 30


def world_size() -> int:
    """Processes of this run as torchrun has started them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this process is the one that speaks for the run."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether torchrun, or this module, has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def processes_to_start(config: RunConfig) -> int:
    """How many processes must be started for the layout: 0 if those that run suffice.

    Raises:
        ValueError: if the layout needs more GPUs than this node has; gives the command that fits.
    """
    size = model_parallel_size(config)
    if world_size() > 1 or size == 1:
        return 0
    import torch

    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and gpus < size:
        nodes = -(-size // gpus)
        raise ValueError(
            f"the parallel layout needs {size} GPUs but this node has {gpus}; on {nodes} nodes run: torchrun --nnodes "
            f"{nodes} --nproc-per-node {gpus} --rdzv-backend c10d --rdzv-endpoint HOST:29500 {' '.join(sys.argv)}"
        )
    return size


def run_processes(count: int, command: Sequence[str]) -> int:
    """Runs ``command`` (arguments of this Python) as ``count`` ranks through torch's elastic launcher.

    The ranks' output goes to this process's. When one rank fails, the others are ended.

    Returns:
        The exit code: 0, or that of the rank that failed first.
    """
    with lasting_imports():
        from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The failed rank has told the user what happened; the launcher's own report would repeat it as a traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # of a torchrun with one process
    ended_by: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        ranks = psutil.Process().children()
        if not ranks:  # not started yet: who starts later would never hear of it
            sys.exit(128 + number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if number in _ENDS:
            ended_by.append(number)
            signal.alarm(_SECONDS_TO_END)

    with tempfile.TemporaryDirectory(prefix="cosmos_mcore_launch_") as folder:  # torch would leave its own behind
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=f"cosmos_mcore_{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            max_restarts=0,
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        if hasattr(launch, "signals_to_handle"):
            # The elastic launcher would raise an exception wherever it happens to be, and kill the ranks half a minute
            # after SIGTERM. One signal it must have.
            launch.signals_to_handle = "SIGQUIT"
            for number in (*_REQUESTS, *_ENDS):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup wants it
                    signal.signal(number, pass_on)
            signal.signal(signal.SIGALRM, _kill_ranks)
        try:
            elastic_launch(launch, sys.executable)(*command)
        except ChildFailedError as error:
            if ended_by:
                return 128 + ended_by[0]
            rank, failure = error.get_first_failure()
            if failure.exitcode < 0:
                print(f"error: rank {rank} was killed by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + int(error.sigval)
        return 0


def _kill_ranks(number: int, frame: object) -> None:
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()


def die_with_parent() -> None:
    """Asks Linux to kill this rank when its launcher dies, even by ``kill -9``: no process is left behind."""
    if sys.platform != "linux" or not launched():
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() == 1 and not _runs_this_python(1):  # it died before the line above
        os._exit(1)


def _runs_this_python(pid: int) -> bool:
    """Whether that process may be our launcher: in a container torchrun itself is often process 1."""
    try:
        return os.path.samefile(f"/proc/{pid}/exe", "/proc/self/exe")
    except OSError:  # gone, or another user's
        return False
