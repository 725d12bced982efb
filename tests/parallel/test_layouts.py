"""Every parallel layout trains the same curve, and continues that of any other layout.

The curve of one process is in ``tests/golden/loss_curve.json``; see ``layouts.py`` for the table.
"""

import json
from pathlib import Path

import pytest

from tests.conftest import GOLDEN
from tests.parallel.layouts import FAST, LAYOUTS, RESUMED_STEPS, RESUMES, STEPS, check, parts_of
from tests.processes import run_ranks

# The first test that needs some number of processes runs all jobs of that size.
pytestmark = pytest.mark.timeout(1800)

CURVES = json.loads((GOLDEN / "loss_curve.json").read_text())


def size_of(job):
    return LAYOUTS[parts_of(job)[1]].world_size


class Jobs:
    """Runs jobs when asked, together with all others that the same processes can do, and keeps their results."""

    def __init__(self, folder, wanted):
        self.folder, self.wanted, self.errors = Path(folder), wanted, {}

    def result(self, job):
        if not self._is_done(job):
            saved, _ = parts_of(job)
            if saved is not None and size_of(saved) != size_of(job):
                self.result(saved)
            self._run([other for other in self.wanted if self._can_run(other, size_of(job))])
        if job in self.errors:
            pytest.fail(self.errors[job])
        return json.loads(self._path(job).read_text())

    def _can_run(self, job, world_size):
        saved, _ = parts_of(job)
        in_reach = saved is None or self._is_done(saved) or size_of(saved) == world_size
        return size_of(job) == world_size and in_reach and not self._is_done(job)

    def _run(self, jobs):
        try:
            world_size, timeout = size_of(jobs[0]), 60 + 15 * size_of(jobs[0]) * len(jobs)
            run_ranks("tests.parallel.layout_worker", world_size, self.folder, *jobs, timeout=timeout)
        except AssertionError as error:
            self.errors |= {job: str(error) for job in jobs if not self._path(job).exists()}

    def _is_done(self, job):
        return self._path(job).exists() or job in self.errors

    def _path(self, job):
        return self.folder / f"{job}.json"


@pytest.fixture(scope="module")
def jobs(request, tmp_path_factory):
    """The jobs of the tests that this session runs, and those whose checkpoints they need."""
    here = [item for item in request.session.items if item.path == request.path]
    asked = [item.callspec.params["job"] for item in here if "job" in getattr(item, "fixturenames", ())]
    saved = [name for job in asked if (name := parts_of(job)[0])]
    return Jobs(tmp_path_factory.mktemp("layouts"), list(dict.fromkeys(saved + asked)))


def marked(jobs):
    return [pytest.param(job, marks=() if job in FAST else pytest.mark.layouts) for job in jobs]


def check_curve(result, model):
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
        assert curve[-1]["loss"] < 0.75 * curve[0]["loss"]
        assert min(step["grad norm"] for step in curve) > 0.5  # all are clipped


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_checks_before_a_run_accept_the_layout(name):
    assert check(name) >= 1


@pytest.mark.parametrize("job", marked(LAYOUTS))
def test_same_curve_from_new_weights(jobs, job):
    result = jobs.result(job)
    assert result["first"] == 0 and len(result["curve"]) == STEPS
    check_curve(result, LAYOUTS[job].model)


@pytest.mark.parametrize("job", marked(name for name in LAYOUTS if "recompute" in name))
def test_recompute_runs_again_what_it_should(jobs, job):
    forwards, micro_batches = jobs.result(job)["forwards"], 4 * STEPS
    assert forwards["layer"] == micro_batches * (1 if "selective" in job else 2)
    assert forwards["attention"] == micro_batches * 2


@pytest.mark.parametrize("job", marked(RESUMES))
def test_same_curve_after_a_resume(jobs, job):
    result = jobs.result(job)
    assert result["first"] == STEPS and len(result["curve"]) == RESUMED_STEPS
    check_curve(result, LAYOUTS[parts_of(job)[1]].model)
