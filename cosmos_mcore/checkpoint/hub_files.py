"""Safetensors shards with an index and a ``config.json``, as the Hugging Face hub expects them."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from cosmos_mcore.checkpoint.files import new_folder
from cosmos_mcore.checkpoint.names import Stored, stored_tensors
from cosmos_mcore.checkpoint.original import part_specs
from cosmos_mcore.checkpoint.reader import Checkpoint, FilesCheckpoint, FileTensor
from cosmos_mcore.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from cosmos_mcore.checkpoint.torch_file import TensorSpec
from cosmos_mcore.model.presets import ModelArch, Yarn

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_CONFIG = "config.json"
MAX_FILE_BYTES = 5_000_000_000


def open_safetensors(path: Path, model_size: str = "auto") -> FilesCheckpoint:
    """Opens a folder of safetensors shards, or one file.

    Raises:
        ValueError: if files are missing or damaged, or hold something else.
    """
    tensors: dict[str, FileTensor] = {}
    for file_path in _files(path):
        file = SafetensorsFile(file_path)
        for name, tensor in file.tensors.items():
            if name in tensors:
                raise ValueError(f"{file_path}: {name} is also in {tensors[name].file.path.name}")
            tensors[name] = FileTensor(tensor, file)
    checkpoint = FilesCheckpoint(path, "safetensors", "hub", [tensors], model_size)
    config = path / _CONFIG if path.is_dir() else path.with_name(_CONFIG)
    if config.is_file():
        _apply_config(checkpoint, config)
    return checkpoint


def write_safetensors(
    checkpoint: Checkpoint, folder: Path, force: bool = False, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Path]:
    """Writes a folder of shards with index and ``config.json``.

    Args:
        checkpoint: the weights.
        folder: to be made.
        force: replace an existing folder.
        max_file_bytes: a shard is closed before it grows over this.

    Returns:
        The files.

    Raises:
        ValueError: if the folder exists.
    """
    stored = stored_tensors(checkpoint.arch, "hub")
    specs = part_specs(checkpoint, stored, 1)
    files = _distribute(stored, specs, max_file_bytes)
    names = [_SINGLE]
    if len(files) > 1:
        names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    with new_folder(folder, force) as temporary:
        for file, tensors in zip(names, files, strict=True):
            with SafetensorsWriter(temporary / file, {t.name: specs[t.name] for t in tensors}) as writer:
                for _, _, block in checkpoint.stream([tensor.originals[0] for tensor in tensors]):
                    writer.write(block)
        if len(files) > 1:
            index = {
                "metadata": {"total_size": sum(map(_bytes, specs.values()))},
                "weight_map": {t.name: name for name, tensors in zip(names, files, strict=True) for t in tensors},
            }
            (temporary / INDEX).write_text(json.dumps(index, indent=2) + "\n")
            names.append(INDEX)
        dtype = str(checkpoint.dtype(stored[0].originals[0])).removeprefix("torch.")
        (temporary / _CONFIG).write_text(json.dumps(model_config(checkpoint.arch, dtype), indent=2) + "\n")
    return [folder / name for name in (*names, _CONFIG)]


def model_config(arch: ModelArch, dtype: str) -> dict[str, Any]:
    """The architecture in the hub's usual words."""
    config: dict[str, Any] = {
        "architectures": ["CosmosARModel"],
        "model_type": "cosmos_autoregressive",
        "torch_dtype": dtype,
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.kv_channels,
        "vocab_size": arch.vocab_size,
        "embedding_size": arch.embedding_size,
        "hidden_act": "silu",
        "rms_norm_eps": arch.layernorm_epsilon,
        "rope_theta": arch.rotary_base,
        "tie_word_embeddings": False,
        "cross_attention_hidden_size": arch.context_size,
        "rope_scaling": None,
    }
    if arch.yarn is not None:
        config["rope_scaling"] = {"rope_type": "yarn", **asdict(arch.yarn)}
    return config


def _apply_config(checkpoint: FilesCheckpoint, path: Path) -> None:
    """Takes from ``config.json`` what shapes do not show, and checks it against what they do."""
    try:
        config = json.loads(path.read_text())
        arch = replace(
            checkpoint.arch,
            num_layers=config["num_hidden_layers"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            kv_channels=config["head_dim"],
            layernorm_epsilon=config["rms_norm_eps"],
            rotary_base=config["rope_theta"],
            yarn=_yarn(config["rope_scaling"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} does not describe a Cosmos video model: {error!r}") from None
    same = ("num_layers", "num_attention_heads", "num_query_groups", "kv_channels")
    wrong = [name for name in same if getattr(arch, name) != getattr(checkpoint.arch, name)]
    if wrong:
        raise ValueError(f"{path} says {wrong[0]}={getattr(arch, wrong[0])}, but the tensors have another")
    checkpoint.arch = arch


def _yarn(value: dict[str, Any] | None) -> Yarn | None:
    if value is None:
        return None
    fields = {name: item for name, item in value.items() if name != "rope_type"}
    return Yarn(**{**fields, "original_latent_shape": tuple(fields["original_latent_shape"])})


def _files(path: Path) -> list[Path]:
    if not path.is_dir() and path.name != INDEX:
        return [path]
    folder = path if path.is_dir() else path.parent
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob("*.safetensors")) or [folder / _SINGLE]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is damaged: it has no weight_map; copy or download it again") from None
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index} names files outside its folder")
    return [folder / name for name in names]


def _distribute(stored: list[Stored], specs: dict[str, TensorSpec], limit: int) -> list[list[Stored]]:
    """Fills files with tensors in order, each up to ``limit`` bytes."""
    files: list[list[Stored]] = [[]]
    size = 0
    for tensor in stored:
        if files[-1] and size + _bytes(specs[tensor.name]) > limit:
            files.append([])
            size = 0
        files[-1].append(tensor)
        size += _bytes(specs[tensor.name])
    return files


def _bytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtype.itemsize
