"""The batch file on two real SLURM nodes: it trains, meets its time limit, requeues itself, resumes and finishes."""

import json
import sys
import time

import pytest

from cosmos_mcore.checkpoint.pointer import iteration_of, latest_checkpoint
from tests.processes import ROOT, free_port
from tests.training.conftest import Command
from tests.training.slurm_cluster import Cluster, missing

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

MORE = 50  # iterations after the requeue
# Two nodes of one rank each; no checkpoints but those of the requests to stop.
CHANGES = (
    "parallel.tensor_model_parallel_size=1",
    "checkpoint.save_interval=1000000",
    "logging.tensorboard=false",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster"), (free_port(), free_port(), free_port())) as cluster:
        yield cluster


def curve_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)


def test_a_job_that_meets_its_time_limit_goes_on(cluster, small_yaml, tmp_path):
    log, root, config = tmp_path / "job.log", tmp_path / "out", tmp_path / "run.yaml"
    folder = root / "tests" / "small" / "run"
    config.write_text(small_yaml.read_text().replace("train_iters: 12", "train_iters: 1000000"))
    submitted = cluster.run(
        "sbatch", "--parsable", "--nodes=2", "--time=2", "--signal=B:USR1@30", f"--output={log}", f"--chdir={ROOT}",
        "scripts/slurm/pretrain.sbatch", str(config), *CHANGES,
        PYTHON=sys.executable, PROCESSES_PER_NODE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
        OUTPUT_ROOT=str(root), PYTHONPATH=str(ROOT),
    )  # fmt: skip
    job = submitted.strip()
    # Its time limit comes before its million iterations; what it reads after the requeue lets it finish.
    wait_for(lambda: log.exists() and f"job {job}: requeued from checkpoint iter_" in log.read_text(), 300)
    done = iteration_of(latest_checkpoint(folder / "checkpoints"))
    iterations = done + MORE
    config.write_text(small_yaml.read_text().replace("train_iters: 12", f"train_iters: {iterations}"))
    wait_for(lambda: "JobState=COMPLETED" in cluster.run("scontrol", "-o", "show", "job", job), 300)
    text = log.read_text()
    assert f"job {job}: asking the run to save and end" in text
    assert "start 2, on n[1-2]" in text
    assert "the run has ended (exit_code 0" in text
    assert text.count("Traceback") == 0

    expected = Command([config, *CHANGES], tmp_path / "uninterrupted", torchrun=2)
    code, _, stderr = expected.finish()
    assert code == 0, stderr
    expected, curve = curve_of(expected.folder), curve_of(folder)
    assert [record["iteration"] for record in curve] == list(range(1, iterations + 1))
    assert curve[done]["resumed from"] == done
    for name in ("consumed samples", "learning rate"):
        assert [record[name] for record in curve] == [record[name] for record in expected]
    assert [record["lm loss"] for record in curve] == pytest.approx([r["lm loss"] for r in expected], rel=1e-4)
