"""Every parallel layout trains the same curve, and continues that of any other layout.

The curve of one process is in ``tests/golden/loss_curve.json``; see ``layouts.py`` for the table.
"""

import json
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from tests.parallel.layouts import LAYOUTS, RESUMED_STEPS, RESUMES, STEPS, check
from tests.processes import run_ranks

FAST = 2  # processes, up to which a layout is part of `make test`
CURVES = json.loads((GOLDEN / "loss_curve.json").read_text())


class Jobs:
    """Runs jobs on demand, all that the asked tests need of one world size together, and keeps their results."""

    def __init__(self, folder, wanted):
        self.folder, self.wanted, self.errors = Path(folder), wanted, {}

    def result(self, job):
        path = self.folder / f"{job}.json"
        if not path.exists() and job not in self.errors:
            self._run(job)
        if not path.exists():
            pytest.fail(self.errors[job])
        return json.loads(path.read_text())

    def _run(self, job):
        saved, _, name = job.rpartition(">")
        resumes = bool(saved)
        size = LAYOUTS[name].world_size
        together = [other for other in self.wanted if self._pending(other) and is_like(other, size, resumes)]
        jobs = list(dict.fromkeys([job, *together]))
        if resumes:
            for other in jobs:
                self.result(other.rpartition(">")[0])
        try:
            steps = RESUMED_STEPS if resumes else STEPS
            run_ranks("tests.parallel.layout_worker", size, self.folder, steps, *jobs, timeout=60 + 20 * size * len(jobs))
        except AssertionError as error:
            self.errors |= {job: str(error) for job in jobs}

    def _pending(self, job):
        return not (self.folder / f"{job}.json").exists() and job not in self.errors


def is_like(job, size, resumes):
    """Whether a job can share the processes of others: as many of them, and the same kind of job."""
    saved, _, name = job.rpartition(">")
    return LAYOUTS[name].world_size == size and bool(saved) == resumes


def is_fast(job):
    return all(LAYOUTS[name].world_size <= FAST for name in job.split(">"))


def marked(jobs):
    return [pytest.param(job, marks=() if is_fast(job) else pytest.mark.layouts) for job in jobs]


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    """All jobs of the tests that this session runs."""
    items = [item for item in request.session.items if item.fspath == request.fspath and hasattr(item, "callspec")]
    names = [item.callspec.params.get("job") for item in items]
    needed = [name for job in names if job for name in (job.rpartition(">")[0], job) if name]
    return Jobs(tmp_path_factory.mktemp("layouts"), list(dict.fromkeys(needed)))


def same_curve(result, model):
    first = result["first"]
    golden = CURVES[model][first : first + len(result["curve"])]
    for i, (found, expected) in enumerate(zip(result["curve"], golden, strict=True)):
        loss, z_loss, grad_norm = found
        where = f"step {first + i + 1}"
        assert loss == pytest.approx(expected["loss"], rel=1e-5), where
        assert z_loss == pytest.approx(expected["z loss"], rel=1e-5), where
        assert grad_norm == pytest.approx(expected["grad norm"], rel=1e-4), where


def test_there_is_something_to_compare():
    for curve in CURVES.values():
        assert len(curve) == 20
        assert curve[-1]["loss"] < 0.9 * curve[0]["loss"]
        assert len({step["grad norm"] for step in curve}) == 20


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_checks_before_a_run_accept_the_layout(name):
    assert check(name) >= 1


@pytest.mark.parametrize("job", marked(LAYOUTS))
def test_same_curve_from_new_weights(jobs, job):
    result = jobs.result(job)
    assert result["first"] == 0 and len(result["curve"]) == STEPS
    same_curve(result, LAYOUTS[job].model)


@pytest.mark.parametrize("job", marked(f"{saved}>{name}" for saved, name in RESUMES))
def test_same_curve_after_a_resume(jobs, job):
    result = jobs.result(job)
    assert result["first"] == STEPS and len(result["curve"]) == RESUMED_STEPS
    same_curve(result, LAYOUTS[job.rpartition(">")[2]].model)
