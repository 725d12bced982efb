"""What one rank of ``test_video2world.py`` runs: ``python -m tests.training.video2world_worker CONFIG FOLDER``.

One start of the processes trains all layouts, since starting costs more than training.
"""

import os
import sys

import torch.distributed as dist

from cosmos_mcore.config import load_config
from cosmos_mcore.parallel.initialize import shut_down
from cosmos_mcore.training.setup import set_up
from cosmos_mcore.training.trainer import Trainer
from tests.processes import free_port

HALF = 6
TENSOR = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")
PIPELINE, CONTEXT = ("parallel.pipeline_model_parallel_size=2",), ("parallel.context_parallel_size=2",)
# The second continues the run of the first.
JOBS = (
    ("resumed", f"training.train_iters={HALF}", *TENSOR),
    ("resumed", *PIPELINE),
    ("context", f"training.train_iters={HALF}", *CONTEXT),
    ("data", f"training.train_iters={HALF}"),
    ("swapped", "training.train_iters=1", "data.prompts={folder}/swapped.jsonl"),
)


def main(path, folder):
    """Leaves the runs under FOLDER, where swapped.jsonl has each prompt with another clip."""
    os.environ["OUTPUT_ROOT"] = folder
    for name, *changes in JOBS:
        changes = [change.format(folder=folder) for change in changes]
        Trainer(set_up(load_config(path, [*changes, f"job.name={name}"]))).train()
        port = [free_port()]
        dist.broadcast_object_list(port)
        shut_down()
        os.environ["MASTER_PORT"] = str(port[0])  # the groups of the next job must not meet what these leave


if __name__ == "__main__":
    main(*sys.argv[1:])
