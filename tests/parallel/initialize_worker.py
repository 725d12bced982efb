"""What one rank of ``test_initialize.py`` runs: ``python -m tests.parallel.initialize_worker FOLDER``.

Joins the groups of one layout after the other and writes down which ranks share a replica.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mcore.config.schema import ParallelConfig
from cosmos_mcore.parallel import initialize as groups
from tests.processes import free_port

LAYOUTS = {
    "tp2-dp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2-dp2": ParallelConfig(pipeline_model_parallel_size=2),
    "cp2-dp2": ParallelConfig(context_parallel_size=2),
    "tp2-pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "dp4": ParallelConfig(),
}


def main(folder):
    """Writes FOLDER/RANK.json."""
    found = {}
    for name, parallel in LAYOUTS.items():
        device = groups.initialize(parallel, seed=7)
        group = groups.replica_group()
        total = torch.tensor([float(2 ** dist.get_rank())])
        dist.all_reduce(total, group=group)
        found[name] = {
            "device": str(device),
            "replica": groups.data_parallel_rank(),
            "replicas": groups.data_parallel_world_size(),
            "members": dist.get_process_group_ranks(group),
            "bits": int(total),
            "place": [
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_context_parallel_rank(),
                parallel_state.get_pipeline_model_parallel_rank(),
            ],
            "random": torch.rand(1).item(),
        }
        port = [free_port()]
        dist.broadcast_object_list(port)
        groups.shut_down()
        assert not dist.is_initialized()
        os.environ["MASTER_PORT"] = str(port[0])
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
