"""Training checkpoints as the original writes them: ``torch.save`` of torch's own AdamW."""

from __future__ import annotations

from pathlib import Path

import torch

from cosmos_mcore.checkpoint.names import original_shapes, shard, stored_tensors
from cosmos_mcore.checkpoint.original import shard_path
from cosmos_mcore.checkpoint.reader import MOMENTS
from cosmos_mcore.model.presets import ModelArch
from tests.checkpoint.models import random_weights

SCHEDULER = {"warmup_iters": 5000, "lr_decay_iters": 50000, "min_lr": 1e-8, "base_lrs": [1e-3], "last_epoch": 3}
SCHEDULER |= {"_step_count": 4, "_last_lr": [6e-7], "_get_lr_called_within_step": False}


def trained_parameters(arch: ModelArch, steps: int = 3) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """bf16 parameters in the table's order after some steps of AdamW on random gradients."""
    parameters = [torch.nn.Parameter(tensor) for tensor in random_weights(arch).values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05)
    for group in optimizer.param_groups:
        group["initial_lr"] = 1e-3
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
    return parameters, optimizer


def write_original(folder: Path, arch: ModelArch, tensor_parallel_size: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    """Writes iteration 3 of a run; returns its weights and moments by state and name."""
    parameters, optimizer = trained_parameters(arch)
    names, state = list(original_shapes(arch)), optimizer.state_dict()
    truth = {"weight": dict(zip(names, (parameter.detach() for parameter in parameters), strict=True))}
    for moment in MOMENTS:
        truth[moment] = {name: state["state"][i][moment] for i, name in enumerate(names)}
    folder.mkdir(parents=True)
    (folder / "latest_checkpoint.txt").write_text("iter_000000003.pt\n")
    base, trainer = folder / "iter_000000003.pt", {"grad_scaler": {}, "iteration": 3}
    if tensor_parallel_size == 1:
        model = {"model." + name: tensor for name, tensor in truth["weight"].items()}
        torch.save({"model": model, "optimizer": state, "scheduler": SCHEDULER, **trainer}, base)
        return truth
    torch.save(trainer, base)
    axes = {stored.name: stored.split_axis for stored in stored_tensors(arch, "originals")}
    for rank in range(tensor_parallel_size):
        # Views, as the original cuts them: each file holds the whole tensors.
        parts = {
            kind: {name: shard(tensor, axes[name], rank, tensor_parallel_size) for name, tensor in tensors.items()}
            for kind, tensors in truth.items()
        }
        states = {
            i: {"step": torch.tensor(3.0), **{moment: parts[moment][name] for moment in MOMENTS}}
            for i, name in enumerate(names)
        }
        torch.save({"model." + name: part for name, part in parts["weight"].items()}, shard_path(base, rank))
        torch.save({**state, "state": states}, shard_path(base, rank, "optim"))
        torch.save(SCHEDULER, shard_path(base, rank, "scheduler"))
    return truth
