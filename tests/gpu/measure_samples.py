"""Measures what generated clips cost a run on GPUs (``logging.sample_interval``); prints one JSON line per step.

    python -m tests.gpu.measure_samples FOLDER conf/teal_tp1.yaml [section.key=value ...]
    torchrun --nproc-per-node 4 -m tests.gpu.measure_samples FOLDER conf/teal_tp4.yaml

Random weights, clips of moving shapes, nothing saved. Between two steps the log tells how long training stood still;
the step after a sample, the first ones apart, should take as long as the others, and the peak of memory stay.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from cosmos_mcore.config import load_config
from cosmos_mcore.data.synthetic import make_shape_clips
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.initialize import shut_down
from cosmos_mcore.parallel.launch import is_rank_zero
from cosmos_mcore.training import trainer as trainer_module
from cosmos_mcore.training.callbacks import Callback
from cosmos_mcore.training.setup import set_up

STEPS, EVERY = 12, 4


class Lines(Callback):
    """Prints what matters of each step."""

    def on_report(self, report):
        record = {
            "iteration": report.iteration,
            "lm loss": report.lm_loss,
            "step (ms)": round(report.step_seconds * 1e3, 1),
            "memory peak (GiB)": round(report.memory_gib, 2),
            "memory now (GiB)": round(torch.cuda.memory_allocated() / 2**30, 2),
            "of the GPU free (GiB)": round(torch.cuda.mem_get_info()[0] / 2**30, 2),
        }
        print(json.dumps(record), flush=True)

    def on_sample(self, iteration, strip):
        print(json.dumps({"strip": str(strip), "of iteration": iteration}), flush=True)


def main(folder, config_path, overrides):
    """Trains twelve steps with a clip after every fourth."""
    os.environ["OUTPUT_ROOT"] = str(folder)
    config = load_config(config_path, [
        f"data.path={folder / 'clips'}", "data.decoder=pyav", "data.token_cache=null", "tokenizer.name=haar",
        "tokenizer.path=null", "checkpoint.load=null", f"training.train_iters={STEPS}", "schedule.warmup_iters=10",
        "schedule.decay_iters=1000", f"logging.sample_interval={EVERY}", *overrides,
    ])  # fmt: skip
    configure_logging()
    if is_rank_zero():
        make_shape_clips(folder / "clips", 8, 40, config.data.height, config.data.width)
    run = set_up(config)
    with mock.patch.object(trainer_module, "Saver") as saver:
        saver.return_value.flags.return_value = ()
        trainer_module.Trainer(run, [Lines()] if dist.get_rank() == 0 else []).train()
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
