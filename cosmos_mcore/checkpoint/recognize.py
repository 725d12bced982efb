"""Recognises a checkpoint of any layout by its content and opens it."""

from __future__ import annotations

from pathlib import Path

from cosmos_mcore.checkpoint.hub_files import INDEX, open_safetensors
from cosmos_mcore.checkpoint.original import existing_shards, open_original, open_shards, shard_base
from cosmos_mcore.checkpoint.reader import Checkpoint
from cosmos_mcore.checkpoint.torch_file import TorchFile
from cosmos_mcore.checkpoint.training_folder import (
    has_optimizer,
    is_trainer_file,
    newest_checkpoint,
    open_plain,
    open_tensor_parallel,
)

_NEMO_WEIGHTS = "weights"  # the folder in a checkpoint of the NeMo port


def open_checkpoint(path: Path, model_size: str = "auto") -> Checkpoint:
    """Opens a checkpoint of any layout, recognised by its content. No tensor is read yet.

    Args:
        path: a file, one of several shards, the base name ``X.pt`` of shards ``X_model_mp_{k}.pt``, or a folder: a
            distributed checkpoint, safetensors shards, a download with ``model.pt``, or a run with
            ``latest_checkpoint.txt``.
        model_size: as ``--model_size``.

    Raises:
        ValueError: one line, if there is nothing, or something damaged, unsafe or of another model.
    """
    if path.is_dir():
        return _open_folder(path, model_size)
    if path.suffix == ".safetensors" or path.name == INDEX:
        return open_safetensors(path, model_size)
    base = shard_base(path)
    if base is not None and path.is_file():
        return open_checkpoint(base, model_size) if _is_trainer(base) else open_shards(base, model_size)
    if path.is_file():
        file = TorchFile(path)
        if is_trainer_file(file):
            shards = existing_shards(path)
            if not shards:
                raise ValueError(f"{path} holds no tensors, and no {path.stem}_model_mp_0.pt is beside it")
            return open_tensor_parallel(file, shards, model_size)
        if has_optimizer(file):
            return open_plain(file, model_size)
        return open_original([path], path, model_size)
    return open_shards(path, model_size)


def _is_trainer(path: Path) -> bool:
    return path.is_file() and is_trainer_file(TorchFile(path))


def _open_folder(path: Path, model_size: str) -> Checkpoint:
    # Only here: torch.distributed.checkpoint takes half a second to import, and files do not need it.
    from cosmos_mcore.checkpoint.distributed_reader import METADATA, DistributedCheckpoint

    if (path / METADATA).is_file() or (path / "metadata.json").is_file():
        return DistributedCheckpoint(path, model_size)
    if (path / _NEMO_WEIGHTS / METADATA).is_file():
        return DistributedCheckpoint(path / _NEMO_WEIGHTS, model_size)
    if (path / INDEX).is_file() or any(path.glob("*.safetensors")):
        return open_safetensors(path, model_size)
    if (path / "model.pt").is_file() or existing_shards(path / "model.pt"):
        return open_checkpoint(path / "model.pt", model_size)
    newest = newest_checkpoint(path)
    if newest is not None:
        return open_checkpoint(newest, model_size)
    raise ValueError(
        f"{path} holds no checkpoint: no .metadata, no *.safetensors, no model.pt and no latest_checkpoint.txt"
    )
