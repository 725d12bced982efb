"""What the ranks of ``test_watching.py`` run: ``python -m tests.training.watching_worker FOLDER LAYOUT...``.

Statistics of a step against those of logits that are computed apart.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mcore.data.loader import Batch
from cosmos_mcore.parallel.initialize import data_parallel_rank, data_parallel_world_size, shut_down
from cosmos_mcore.training.evaluation import run_forward
from cosmos_mcore.training.token_stats import TokenStats
from tests.parallel.layout_worker import global_batch, set_up_without_clips
from tests.parallel.layouts import BASE, config_of
from tests.processes import free_port


def expected(run, tokens):
    """Loss per frame and accuracy out of the whole logits, in one process."""
    inputs, labels = TokenStats(run.layout, run.arch, 0.0, run.device).batch(tokens)
    with torch.no_grad():
        logits = run.chunks[0](inputs).transpose(0, 1)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    losses = losses.view(labels.shape)[:, : run.layout.num_tokens - 1]
    right = (logits.argmax(-1) == labels)[:, : run.layout.num_tokens - 1]
    per_frame = run.layout.num_tokens // run.layout.latent_shape[0]
    kept = slice(run.layout.num_ignored_tokens, None)
    frames = losses[:, kept].unflatten(1, (-1, per_frame)).mean(dim=(0, 2))
    return {"frames": frames.tolist(), "accuracy": right[:, kept].float().mean().item()}


def main(folder, layouts):
    """Writes FOLDER/LAYOUT.json of each layout."""
    for layout in layouts:
        measure(folder, layout)
        port = [free_port()]
        dist.broadcast_object_list(port)
        shut_down()
        os.environ["MASTER_PORT"] = str(port[0])  # the groups of the next layout must not meet what these leave


def measure(folder, layout):
    """Runs one layout."""
    os.environ["OUTPUT_ROOT"] = str(folder / layout)
    run = set_up_without_clips(config_of(layout), BASE)
    tokens, _ = global_batch(0, run.layout, run.config.training.global_batch_size, run.arch)
    share = len(tokens) // data_parallel_world_size()
    mine = tokens[data_parallel_rank() * share : (data_parallel_rank() + 1) * share]
    stats = TokenStats(run.layout, run.arch, 0.0, run.device, run.chunks)
    run_forward(run, stats, Batch(mine))
    found = stats.read()
    result = {"frames": found.frame_losses, "loss": found.loss, "accuracy": found.token_accuracy}
    if parallel_state.get_model_parallel_group().size() == 1 and dist.get_world_size() == 1:
        result["expected"] = expected(run, tokens)
    if dist.get_rank() == 0:
        (folder / f"{layout}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
