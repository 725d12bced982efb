"""Trains one model for a few steps in several layouts of the same processes, on synthetic clips.

Prints one JSON line per layout.

torchrun --nproc-per-node N tests/gpu/layout_worker.py '{"arch": {...}, "frames": 33, ..., "layouts": {"tp2": {...}}}'
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mcore.checkpoint.load import initialize_weights
from cosmos_mcore.config import RunConfig, derive_video_layout
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.setup import build_trainable
from cosmos_mcore.training.step import LossPositions, train_step


def run_layout(task: dict[str, Any], layout_keys: dict[str, Any]) -> dict[str, Any]:
    """Ten or so steps from the same weights on the same clips; loss and grad norm of each."""
    config = RunConfig()
    config.precision.dtype = task.get("dtype", "bf16")
    config.data.height, config.data.width, config.data.num_frames = task["height"], task["width"], task["frames"]
    config.training.global_batch_size = task["global_batch_size"]
    for key, value in layout_keys.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    arch = ModelArch(**task["arch"])
    layout = derive_video_layout(config)
    device = groups.initialize(config.parallel, seed=0)
    chunks, model, optimizer = build_trainable(config, arch, layout, device)
    initialize_weights(chunks, arch, seed=0)
    optimizer.reload_model_params()
    positions = LossPositions(layout, arch, 1e-4, device)
    share = task["global_batch_size"] // groups.data_parallel_world_size()
    losses, norms, seconds = [], [], []
    for step in range(task["steps"]):
        generator = torch.Generator().manual_seed(step % task["distinct_batches"])
        # A few ids only, so that there is something to learn.
        batch = torch.randint(0, 256, (task["global_batch_size"], layout.num_tokens), generator=generator)
        mine = batch[groups.data_parallel_rank() * share :][:share].to(device)
        set_learning_rate(optimizer, task["lr"])
        dist.barrier()
        start = time.perf_counter()
        result = train_step(model, optimizer, positions, mine, config.training.micro_batch_size).read()
        seconds.append(time.perf_counter() - start)
        losses.append(result.loss + result.z_loss)
        norms.append(result.grad_norm)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return {
        "losses": losses,
        "grad_norms": norms,
        "ms_per_step": sorted(seconds)[len(seconds) // 2] * 1e3,
        "peak_memory_gb": memory,
        "padded_sequence_length": layout.padded_sequence_length,
    }


def main() -> None:
    """Runs all layouts of the task."""
    task = json.loads(sys.argv[1])
    for name, layout_keys in task["layouts"].items():
        try:
            result = run_layout(task, layout_keys)
        except Exception as error:  # the other layouts still tell something
            if dist.get_world_size() > 1 and not isinstance(error, ValueError):
                raise
            result = {"error": f"{type(error).__name__}: {error}"}
        if dist.get_rank() == 0:
            print("RESULT " + json.dumps({"layout": name, **result}), flush=True)
        parallel_state.destroy_model_parallel()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    groups.shut_down()


if __name__ == "__main__":
    main()
