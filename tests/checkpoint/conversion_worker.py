"""What the process of ``test_distributed.py`` runs: ``python -m tests.checkpoint.conversion_worker FOLDER``."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from cosmos_mcore.checkpoint.convert import convert
from cosmos_mcore.checkpoint.distributed import load_checkpoint, save_checkpoint
from cosmos_mcore.checkpoint.reader import MASTER, MOMENTS, WEIGHT
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.parallel.initialize import shut_down
from tests.parallel.layout_worker import set_up_without_clips, train
from tests.parallel.layouts import BASE, config_of


def converted(folder, name, dtype):
    """Saves a run, converts it, and says what is the same."""
    os.environ["OUTPUT_ROOT"] = str(folder)
    config = config_of(name)
    config.precision.dtype = dtype
    run = set_up_without_clips(config, BASE)
    train(run, 2)
    run.progress.iteration, run.progress.consumed_samples = 5, 24  # three steps were skipped
    path = save_checkpoint(run.checkpoints, 5, run.chunks, run.optimizer, asdict(run.progress))
    convert(path, folder / "copy", "distributed", tensor_parallel_size=2)
    convert(path, folder / "original", "training")
    one, two, original = (open_checkpoint(place) for place in (path, folder / "copy", folder / "original"))
    states = (WEIGHT, *MOMENTS, MASTER) if one.has_master else (WEIGHT, *MOMENTS)
    found = {
        "step": two.training.step,
        "moments": original.training.step,
        "different": [
            f"{state} of {key}"
            for key in one.names
            for state in states
            if not torch.equal(one.read(key, state), two.read(key, state))
        ],
        "exact": one.has_master and not torch.equal(one.read("norm.weight"), one.read("norm.weight", MASTER)),
    }
    if config.parallel.use_distributed_optimizer:
        found["progress"] = load_checkpoint(folder / "copy", run.chunks, run.optimizer)
    else:
        found["progress"] = {"iteration": two.training.iteration, "consumed_samples": two.training.consumed_samples}
    shut_down()
    return found


def main(folder):
    """Writes FOLDER/results.json."""
    results = {}
    for name, dtype in (("one", "bf16"), ("one-unsharded", "bf16"), ("one-unsharded", "fp32")):
        results[f"{name} {dtype}"] = converted(folder / f"{name}-{dtype}", name, dtype)
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
