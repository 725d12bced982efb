"""The original's files: ``model.pt``, its tensor-parallel shards, its TE backend's names.

Facts: spec/checkpoint.md sections 1 to 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from cosmos_mcore.checkpoint.files import new_files
from cosmos_mcore.checkpoint.names import Stored, original_shapes, part_shape, shard_rows, stored_tensors
from cosmos_mcore.checkpoint.reader import Checkpoint, FilesCheckpoint, FileTensor
from cosmos_mcore.checkpoint.torch_file import TensorSpec, TorchFile, TorchFileWriter

PREFIX = "model."
_SHARD = re.compile(r"(.+)_model_mp_(\d+)\.pt")
TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)


def shard_path(base: Path, rank: int, kind: str = "model") -> Path:
    """Name of a rank's file: ``X.pt`` gives ``X_model_mp_{rank}.pt``."""
    return base.with_name(f"{base.stem}_{kind}_mp_{rank}.pt")


def shard_base(path: Path) -> Path | None:
    """The base name ``X.pt`` of a shard ``X_model_mp_{rank}.pt``; None for other files."""
    match = _SHARD.fullmatch(path.name)
    return match and path.with_name(match.group(1) + ".pt")


def existing_shards(base: Path, kind: str = "model") -> list[Path]:
    """The shards of ``base`` that are there, by rank.

    Raises:
        ValueError: if their ranks are not 0 to N-1 with N = 1, 2, 4 or 8.
    """
    ranks = sorted(int(path.stem.rpartition("_")[2]) for path in files_of_ranks(base, kind))
    if ranks and (ranks != list(range(len(ranks))) or len(ranks) not in TENSOR_PARALLEL_SIZES):
        absent = next((rank for rank in range(max(ranks) + 1) if rank not in ranks), max(ranks) + 1)
        raise ValueError(f"{shard_path(base, absent, kind)} is missing: found shards {ranks} of {base.name}")
    return [shard_path(base, rank, kind) for rank in ranks]


def files_of_ranks(base: Path, *kinds: str) -> list[Path]:
    """All files ``X_{kind}_mp_{rank}.pt`` of ``X.pt`` that are there, whatever their ranks, and no others."""
    pattern = re.compile(re.escape(base.stem) + rf"_({'|'.join(kinds)})_mp_\d+\.pt")
    folder = base.parent.iterdir() if base.parent.is_dir() else ()
    return [path for path in folder if pattern.fullmatch(path.name)]


def open_original(paths: Sequence[Path], base: Path, model_size: str = "auto") -> FilesCheckpoint:
    """Opens ``model.pt`` (one path) or all its shards, in the original's or its TE backend's names.

    Args:
        paths: the files, by tensor-parallel rank.
        base: what to call them all in messages.
        model_size: as ``--model_size``.

    Raises:
        ValueError: if a file is damaged, would run code, or holds something else.
    """
    ranks = [state_dict(TorchFile(path)) for path in paths]
    naming = naming_of(ranks[0], paths[0])
    layout = "te" if naming == "te" else "monolithic" if len(paths) == 1 else "mp"
    return FilesCheckpoint(base, layout, naming, ranks, model_size)


def open_shards(base: Path, model_size: str = "auto", tensor_parallel_size: int | None = None) -> FilesCheckpoint:
    """Opens the shards ``X_model_mp_{k}.pt`` of ``X.pt``.

    Args:
        base: ``X.pt``, which need not exist.
        model_size: as ``--model_size``.
        tensor_parallel_size: how many there should be; None: as many as there are.

    Raises:
        ValueError: if there are none or another number, or one is damaged.
    """
    shards = existing_shards(base)
    if not shards:
        raise ValueError(f"{base} does not exist, nor does {shard_path(base, 0).name} beside it")
    if tensor_parallel_size not in (None, len(shards)):
        raise ValueError(
            f"{base.stem}_model_mp_*.pt: there are {len(shards)} shards in {base.parent}; give --tensor_parallel_size "
            f"{len(shards)} instead of {tensor_parallel_size}"
        )
    return open_original(shards, base, model_size)


def state_dict(file: TorchFile) -> dict[str, FileTensor]:
    """The weights of a file: flat, with or without ``model.`` prefix, or nested under ``model``; no ``_extra_state``.

    Raises:
        ValueError: if there is something else in it.
    """
    content = file.content
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict):
        raise ValueError(f"{file.path} holds a {type(content).__name__}, not named tensors")
    tensors = {}
    for name, value in content.items():
        if "_extra_state" in str(name):
            continue
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file.path}: {name} is a {type(value).__name__}, not a tensor")
        short = name.removeprefix(PREFIX)
        if short in tensors:
            raise ValueError(
                f"{file.path}: {short} is there twice, with and without {PREFIX!r}; which one is it to be?"
            )
        tensors[short] = FileTensor(value, file)
    return tensors


def naming_of(tensors: Mapping[str, Any], path: Path) -> str:
    """Tells the original's names from its TE backend's by the first telling key, as the original does.

    Raises:
        ValueError: if there is no such key.
    """
    for name in tensors:
        if "self_attention.layernorm_qkv.query_weight" in name:
            return "te"
        if "attention.wq.weight" in name:
            return "originals"
    shown = ", ".join(list(tensors)[:3]) or "no tensors"
    raise ValueError(f"{path} is not a Cosmos video model: it has {shown}, but no attention.wq.weight")


def write_original(
    checkpoint: Checkpoint,
    path: Path,
    tensor_parallel_size: int = 1,
    naming: str = "originals",
    form: str = "prefixed",
    force: bool = False,
    sharded_name: bool = False,
) -> list[Path]:
    """Writes ``path``, or its shards, reading each tensor once.

    Args:
        checkpoint: the weights.
        path: ``X.pt``; shards are named ``X_model_mp_{k}.pt``.
        tensor_parallel_size: number of shards.
        naming: ``originals`` or ``te``.
        form: ``prefixed`` (flat, as released), ``plain`` (flat, no ``model.``) or ``nested`` (under ``model``).
        force: replace existing files.
        sharded_name: use the name of a shard even for one file.

    Returns:
        The files.

    Raises:
        ValueError: if the model cannot be cut so, or an output exists.
    """
    if path.suffix != ".pt" or path.is_dir():
        raise ValueError(f"{path}: the output's name must end with .pt")
    check_tensor_parallel_size(checkpoint, tensor_parallel_size)
    sharded = sharded_name or tensor_parallel_size > 1
    paths = [shard_path(path, rank) for rank in range(tensor_parallel_size)] if sharded else [path]
    stored = stored_tensors(checkpoint.arch, naming)
    specs = part_specs(checkpoint, stored, tensor_parallel_size)
    prefix = "" if form == "plain" else PREFIX
    structure: dict[str, Any] = {prefix + name: spec for name, spec in specs.items()}
    if form == "nested":
        structure = {"model": structure}
    stale = files_of_ranks(path, "model") if sharded else []
    with new_files(paths, force, stale) as temporary, ExitStack() as stack:
        writers = [stack.enter_context(TorchFileWriter(file, structure)) for file in temporary]
        write_tensors(checkpoint, stored, writers)
    return paths


def check_tensor_parallel_size(checkpoint: Checkpoint, size: int) -> None:
    """Checks that the model can be cut in ``size`` parts.

    Raises:
        ValueError: if not.
    """
    groups = checkpoint.arch.num_query_groups
    if size not in TENSOR_PARALLEL_SIZES or groups % size:
        fits = [n for n in TENSOR_PARALLEL_SIZES if groups % n == 0]
        raise ValueError(f"--tensor_parallel_size {size} does not suit {checkpoint.path}; possible: {fits}")


def part_specs(checkpoint: Checkpoint, stored: Sequence[Stored], size: int) -> dict[str, TensorSpec]:
    """What one rank's file holds, by stored name.

    Raises:
        ValueError: if parts of one stored tensor differ in dtype.
    """
    shapes, specs = original_shapes(checkpoint.arch), {}
    for tensor in stored:
        dtypes = {checkpoint.dtype(name) for name in tensor.originals}
        if len(dtypes) > 1:
            raise ValueError(f"{checkpoint.path}: {' and '.join(tensor.originals)} differ in dtype: cannot be joined")
        specs[tensor.name] = TensorSpec(part_shape(tensor, shapes, size), dtypes.pop())
    return specs


def write_tensors(checkpoint: Checkpoint, stored: Sequence[Stored], writers: Sequence[TorchFileWriter]) -> None:
    """Appends every tensor to the file of each rank, cut for it."""
    shapes = original_shapes(checkpoint.arch)
    axes = {name: tensor.split_axis for tensor in stored for name in tensor.originals}
    for name, first, block in checkpoint.stream(list(axes)):
        for rank, writer in enumerate(writers):
            part = shard_rows(block, first, shapes[name][0], axes[name], rank, len(writers))
            if part.size(0):
                writer.write(part)
