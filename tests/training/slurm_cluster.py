"""Two SLURM nodes on this machine: a controller and two node daemons, as root, with Debian's slurm-wlm and munge."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
SlurmctldPort={ports[0]}
MpiDefault=none
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no cluster here, if there cannot."""
    if os.geteuid() != 0:
        return "the daemons need root"
    tools = [tool for tool in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(tool) is None]
    return f"{', '.join(tools)}: not installed (apt-get install slurm-wlm munge)" if tools else None


class Cluster:
    """A context manager; ``run`` gives commands its configuration."""

    def __init__(self, folder: Path, ports: tuple[int, int, int]) -> None:
        self.folder, self._daemons = folder, []
        self.conf = folder / "slurm.conf"
        (folder / "state").mkdir(parents=True)
        self.conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=ports))

    def __enter__(self) -> Cluster:
        """Starts munge, if it does not run, and the daemons, and waits until both nodes are idle."""
        if subprocess.run(["munge", "-n"], capture_output=True).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            self._start("runuser", "-u", "munge", "--", "munged", "--foreground")
            time.sleep(1)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._start("slurmd", "-D", "-N", node)
        deadline = time.monotonic() + 60
        while self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).strip() != "2":
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the jobs and the daemons."""
        self.run("scancel", "--user=root", check=False)
        time.sleep(2)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Runs a client of SLURM and returns what it prints."""
        env = {**os.environ, "SLURM_CONF": str(self.conf), **environment}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def _start(self, *command: str) -> None:
        log = open(self.folder / f"{command[0]}.out", "ab")  # noqa: SIM115 - as long as the daemon
        env = {**os.environ, "SLURM_CONF": str(self.conf)}
        self._daemons.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
