"""What the ranks of ``test_samples.py`` run: ``python -m tests.training.samples_worker FOLDER CONFIG JOB...``.

A job is ``NAME:section.key=value,...``: it trains without and with a generated clip every second step. Jobs in which
something goes wrong train with clips only.
"""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cosmos_mcore.config import load_config, run_dir
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.initialize import shut_down
from cosmos_mcore.training.samples import Samples
from cosmos_mcore.training.setup import set_up
from cosmos_mcore.training.trainer import Trainer
from tests.processes import free_port


class Watched(Samples):
    """Samples that must leave every generator of random numbers as it was."""

    def take(self, iteration):
        while self._thread is not None and self._thread.busy:
            time.sleep(0.01)
        before = self.generators()
        super().take(iteration)
        assert self.generators() == before

    @staticmethod
    def generators():
        states = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
        return [state.tolist() for state in states], str(np.random.get_state()), random.getstate()


def train(folder, config_path, name, overrides, interval):
    """One run; its folder is FOLDER/NAME/on or off."""
    os.environ["OUTPUT_ROOT"] = str(folder / name / ("on" if interval else "off"))
    if interval:
        overrides = [*overrides, f"logging.sample_interval={interval}"]
    config = load_config(config_path, overrides)
    run = set_up(config)
    if name == "unwritable" and dist.get_rank() == 0:
        run_dir(config).mkdir(parents=True, exist_ok=True)
        (run_dir(config) / "samples").touch()
    if name == "unreadable":
        Path(config.data.validation_path).unlink()
    trainer = Trainer(run)
    if trainer.samples is not None:
        trainer.samples.__class__ = Watched
    trainer.train()
    port = [free_port()]
    dist.broadcast_object_list(port)
    shut_down()
    os.environ["MASTER_PORT"] = str(port[0])  # the groups of the next run must not meet what these leave


def main(folder, config_path, jobs):
    """All jobs, in the processes that there are."""
    configure_logging()
    for job in jobs:
        name, _, overrides = job.partition(":")
        for interval in (2,) if name.startswith("un") else (None, 2):
            train(folder, config_path, name, overrides.split(",") if overrides else [], interval)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
