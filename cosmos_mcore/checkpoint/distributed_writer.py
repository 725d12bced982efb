"""Megatron's distributed checkpoints, written in one process tensor by tensor, without building the model.

The format is described in ``distributed_reader.py``. PyTorch's own writer keeps what it has written in memory.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cosmos_mcore.checkpoint.distributed_reader import COMMON, METADATA, STATE_PREFIX, stacked_sizes
from cosmos_mcore.checkpoint.files import ahead, new_folder
from cosmos_mcore.checkpoint.names import Entry, entries, fuse, shard, stacked_name
from cosmos_mcore.checkpoint.original import check_tensor_parallel_size
from cosmos_mcore.checkpoint.reader import MASTER, MOMENTS, WEIGHT, Checkpoint, TrainingState
from cosmos_mcore.checkpoint.torch_file import TorchFileWriter
from cosmos_mcore.model.presets import ModelArch

_CONFIG = "metadata.json"
_Item = tuple[Entry, str, str, "torch.dtype | None"]


def write_distributed(
    checkpoint: Checkpoint,
    folder: Path,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    force: bool = False,
) -> list[Path]:
    """Writes a distributed checkpoint, with the optimizer's state where ``checkpoint`` has it.

    Any parallel layout can load it; the sizes only choose the chunks, so that ranks of that layout read no more than
    their own.

    Args:
        checkpoint: the weights.
        folder: to be made.
        tensor_parallel_size: chunks that each tensor is cut in.
        pipeline_parallel_size: groups of layers that lie in files of their own.
        force: replace an existing folder.

    Returns:
        The files.

    Raises:
        ValueError: if the model cannot be cut so, tensors that become one differ in dtype, or the folder exists.
    """
    arch, tp, pp = checkpoint.arch, tensor_parallel_size, pipeline_parallel_size
    check_tensor_parallel_size(checkpoint, tp)
    if pp < 1 or arch.num_layers % pp:
        raise ValueError(f"--pipeline_parallel_size {pp} does not divide the {arch.num_layers} layers of the model")
    names = [f"__{rank}_0.distcp" for rank in range(tp * pp)]
    _check_dtypes(checkpoint)
    sizes = stacked_sizes(arch)
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    with new_folder(folder, force) as temporary:
        with ExitStack() as stack:
            files = [stack.enter_context(open(temporary / name, "wb")) for name in names]
            for item, parts in ahead((item, _read(checkpoint, item)) for item in _parameters(checkpoint)):
                entry, prefix, state, _ = item
                key, layer = stacked_name(entry.ours)
                stage = layer * pp // arch.num_layers if layer is not None else 0 if "embedding" in key else pp - 1
                for rank, offsets, chunk in _chunks(parts, entry, arch, tp):
                    if layer is not None:
                        offsets, chunk = [layer, *offsets], chunk[None]
                    where = stage * tp + rank
                    info = _append(files[where], names[where], chunk)
                    _record(metadata, prefix + key, sizes[key], offsets, chunk, info)
                for name in entry.originals:
                    checkpoint.release(name, state)
        with open(temporary / METADATA, "wb") as file:
            pickle.dump(metadata, file)
        with TorchFileWriter(temporary / COMMON, _common_state(checkpoint.training)):
            pass  # it holds no tensors
        config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (temporary / _CONFIG).write_text(json.dumps({**config, "common_backend": "torch", "common_backend_version": 1}))
    return [folder / name for name in (*names, METADATA, COMMON, _CONFIG)]


def _check_dtypes(checkpoint: Checkpoint) -> None:
    """The layers of a parameter, and what is fused to it, are one stored tensor."""
    first: dict[str, str] = {}
    for entry in entries(checkpoint.arch):
        for name in entry.originals:
            other = first.setdefault(stacked_name(entry.ours)[0], name)
            if checkpoint.dtype(name) != checkpoint.dtype(other):
                raise ValueError(f"{checkpoint.path}: {other} and {name} differ in dtype: cannot be joined")


def _parameters(checkpoint: Checkpoint) -> Iterator[_Item]:
    """What to write: parameter, key prefix, state to read, and dtype to write it in (None: as it is)."""
    for entry in entries(checkpoint.arch):
        yield entry, STATE_PREFIX[WEIGHT], WEIGHT, None
        if checkpoint.training is not None:
            yield entry, STATE_PREFIX[MASTER], MASTER if checkpoint.has_master else WEIGHT, torch.float32
            for state in MOMENTS:
                yield entry, STATE_PREFIX[state], state, torch.float32


def _read(checkpoint: Checkpoint, item: _Item) -> list[Tensor]:
    entry, _, state, dtype = item
    parts = [checkpoint.read(name, state) for name in entry.originals]
    return parts if dtype is None else [part.to(dtype) for part in parts]


def _chunks(
    parts: Sequence[Tensor], entry: Entry, arch: ModelArch, tensor_parallel_size: int
) -> Iterator[tuple[int, list[int], Tensor]]:
    """Cuts a parameter: rank, offsets in the whole, and values of each chunk."""
    axis = entry.split_axis
    for rank in range(1 if axis is None else tensor_parallel_size):
        cut = [shard(part, axis, rank, tensor_parallel_size) for part in parts]
        start = 0
        for chunk in cut if entry.fusion == "gate_up" else [fuse(cut, entry, arch)]:
            offsets = [0] * chunk.dim()
            if axis is not None:
                offsets[axis] = start + rank * chunk.size(axis)
                start += tensor_parallel_size * chunk.size(axis)
            yield rank, offsets, chunk


def _append(file: IO[bytes], name: str, chunk: Tensor) -> _StorageInfo:
    offset = file.tell()
    with TorchFileWriter.inside(file, chunk) as archive:
        archive.write(chunk)
    return _StorageInfo(name, offset, file.tell() - offset)


def _record(
    metadata: Metadata, key: str, size: Sequence[int], offsets: Sequence[int], chunk: Tensor, info: _StorageInfo
) -> None:
    """Enters a chunk in the list of what is stored where."""
    stored = metadata.state_dict_metadata.setdefault(
        key, TensorStorageMetadata(TensorProperties(dtype=chunk.dtype), torch.Size(size), [])
    )
    assert isinstance(stored, TensorStorageMetadata)
    stored.chunks.append(ChunkStorageMetadata(torch.Size(offsets), chunk.size()))
    metadata.storage_data[MetadataIndex(key, offsets)] = info


def _common_state(training: TrainingState | None) -> dict[str, Any]:
    """What Megatron keeps beside tensors; the optimizer's settings as its distributed optimizer looks for them."""
    if training is None:
        return {}
    given, consumed = training.param_group, training.consumed_samples
    group = {
        "wd_mult": 1.0,
        "lr_mult": 1.0,
        "is_expert_parallel": False,
        "is_decoupled_lr": False,
        "default_config": True,
        **given,
        "step": training.step,
    }
    return {
        "optimizer": {"optimizer": {"param_groups": [group]}, "param_state_sharding_type": "fully_reshardable"},
        "progress": {
            "iteration": training.iteration,
            # The original does not say, and has one clip per iteration.
            "consumed_samples": training.iteration if consumed is None else consumed,
        },
    }
