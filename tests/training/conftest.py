"""A tiny run on the command line: clips, config, and a process that can be watched and killed."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from tempfile import TemporaryFile

import pytest

from tests.processes import ROOT, environment, processes_with, wait_until_gone
from tests.videos import write_test_clip

MAIN = ROOT / "examples" / "pretrain_cosmos_ar.py"
SMALL = """
job: {{project: tests, group: small, name: run}}
model:
  preset: tiny
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 48
  num_attention_heads: 4
  num_query_groups: 2
  kv_channels: 8
data: {{path: {clips}, height: 32, width: 48, num_frames: 17, start_frame_interval: 3}}
parallel: {{tensor_model_parallel_size: 2}}
precision: {{dtype: fp32}}
optimizer: {{lr: 5.0e-3}}
schedule: {{warmup_iters: 2, decay_iters: 12}}
training: {{train_iters: 12, global_batch_size: 4, micro_batch_size: 2}}
checkpoint: {{save_interval: 4}}
"""


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Three files with eight clips each; left unchanged by all tests."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_test_clip(folder / f"{number}.mp4", 40, height=32 + 16 * number)
    return folder


@pytest.fixture(scope="session")
def small_yaml(clips, tmp_path_factory):
    """The config of a run over two processes that takes seconds."""
    path = tmp_path_factory.mktemp("conf") / "small.yaml"
    path.write_text(SMALL.format(clips=clips))
    return path


def read(file):
    file.seek(0)
    return file.read()


class Command:
    """The training command in processes of its own; ``finish`` also checks that none of them lives on."""

    def __init__(self, arguments, output_root, torchrun=0, **variables):
        self.mark, self.folder = uuid.uuid4().hex, Path(output_root) / "tests" / "small" / "run"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={torchrun}"] if torchrun else []
        command = [sys.executable, *launcher, str(MAIN), *map(str, arguments)]
        env = environment(OUTPUT_ROOT=str(output_root), MARK=self.mark, **variables)
        self.started = time.monotonic()
        # Files, not pipes: a process left behind would hold a pipe open.
        self.stdout, self.stderr = TemporaryFile("w+"), TemporaryFile("w+")  # noqa: SIM115  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=self.stdout, stderr=self.stderr)

    def wait_for(self, condition, seconds=120):
        """Waits until ``condition()`` holds, in a run that must still be alive then; returns what it gave."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, "what the test waits for did not happen"
            assert self.process.poll() is None, read(self.stderr)
            time.sleep(0.01)
        return found

    def finish(self):
        """Waits for the end; returns (exit code, standard output, standard error)."""
        code = self.process.wait(240)
        self.seconds = time.monotonic() - self.started
        assert wait_until_gone(self.mark) == [], "processes left behind"
        return code, read(self.stdout), read(self.stderr)

    def metrics(self):
        """The complete lines of ``metrics.jsonl`` so far."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


@pytest.fixture
def command(request, tmp_path):
    """Starts training commands; whatever they leave behind is killed after the test."""
    started = []

    def start(*arguments, output_root=tmp_path / "out", torchrun=0, **variables):
        started.append(Command(arguments, output_root, torchrun, **variables))
        return started[-1]

    yield start
    for one in started:
        for pid in processes_with(one.mark):
            os.kill(pid, signal.SIGKILL)
        one.process.wait()
        one.stdout.close()
        one.stderr.close()


@pytest.fixture(scope="session")
def uninterrupted(small_yaml, tmp_path_factory):
    """The folder of a finished run of twelve steps."""
    run = Command([small_yaml], tmp_path_factory.mktemp("uninterrupted"))
    code, _, stderr = run.finish()
    assert (code, stderr) == (0, "")
    return run.folder
