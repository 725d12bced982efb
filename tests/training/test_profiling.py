"""A profile is worth less than the run that it is of."""

import logging

import torch.distributed as dist

from cosmos_mcore.config import RunConfig, run_dir
from cosmos_mcore.training.profiling import Profiler


def test_a_trace_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(logging.getLogger("cosmos_mcore"), "propagate", True)
    config = RunConfig()
    config.logging.profile_step_start, config.logging.profile_step_end = 1, 2
    run_dir(config).parent.mkdir(parents=True)
    run_dir(config).touch()  # a file where the run's folder should be
    profiler = Profiler(config)
    for iteration in range(4):
        profiler.before_step(iteration)
    profiler.close()
    assert "cannot be written" in caplog.text and "training goes on" in caplog.text
