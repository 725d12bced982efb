"""Puts weights under the original's names into the model chunks of this rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from cosmos_mcore.checkpoint.architecture import check_tensors
from cosmos_mcore.checkpoint.checksums import check_checksums
from cosmos_mcore.checkpoint.distributed import load_weights
from cosmos_mcore.checkpoint.names import Entry, entries, local_value, original_shapes
from cosmos_mcore.checkpoint.pointer import is_distributed
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.init import initial_tensor
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.parallel.agreement import errors_of_all


def global_parameters(chunks: Sequence[CosmosARModel]) -> Iterator[tuple[str, Parameter]]:
    """This rank's parameters under names whose layer numbers count over the whole model, not over the stage."""
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter


def named_entries(chunks: Sequence[CosmosARModel], arch: ModelArch) -> Iterator[tuple[Entry, Parameter]]:
    """This rank's parameters, each with its entry in the name table."""
    table = {}
    for entry in entries(arch):
        table[entry.ours] = entry
        if entry.local is not None:
            table[entry.local] = entry
    for name, parameter in global_parameters(chunks):
        yield table[name], parameter


@torch.no_grad()
def set_weights(chunks: Sequence[CosmosARModel], arch: ModelArch, get: Callable[[str], Tensor]) -> None:
    """Sets every parameter of this rank from ``get``, which gives full tensors under the original's names."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    for entry, parameter in named_entries(chunks, arch):
        parameter.copy_(local_value(get, entry, arch, rank, size))


def initialize_weights(chunks: Sequence[CosmosARModel], arch: ModelArch, seed: int) -> None:
    """Draws the start weights: the same model for every parallel layout."""
    device = next(chunks[0].parameters()).device
    shapes = original_shapes(arch)
    set_weights(chunks, arch, lambda name: initial_tensor(name, shapes[name], arch, seed, device))


def load_any_weights(path: Path, arch: ModelArch, chunks: Sequence[CosmosARModel]) -> None:
    """Loads weights in any layout that ``open_checkpoint`` recognises.

    Raises:
        ValueError: if there is nothing to load, or it is damaged, unsafe, or another model; lists what differs.
    """
    if is_distributed(path):
        # Each rank reads its part of the values without comparing anything, so bytes are compared first.
        check = partial(check_checksums, path, dist.get_rank(), dist.get_world_size(), weights_only=True)
        errors, _ = errors_of_all(check)
        if errors:
            raise ValueError(f"checkpoint {path} cannot be loaded: {errors[0]}")
        load_weights(path, chunks)
        return
    checkpoint = open_checkpoint(path)
    check_tensors(original_shapes(checkpoint.arch), original_shapes(arch), f"{path}, for the configured model,")
    set_weights(chunks, arch, checkpoint.read)
