"""The original's training checkpoints: weights with Adam's moments (spec/checkpoint.md section 4).

Plain: ``iter_{N}.pt`` with ``model``, ``optimizer``, ``scheduler``, ``grad_scaler`` and ``iteration``. Tensor-parallel:
``iter_{N}.pt`` with only the last two, and beside it ``iter_{N}_{model,optim,scheduler}_mp_{k}.pt`` for each rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_mcore.checkpoint.files import flush, new_files, refuse_existing
from cosmos_mcore.checkpoint.names import shard, stored_tensors
from cosmos_mcore.checkpoint.original import (
    PREFIX,
    check_tensor_parallel_size,
    files_of_ranks,
    naming_of,
    part_specs,
    shard_path,
    state_dict,
    write_tensors,
)
from cosmos_mcore.checkpoint.pointer import LATEST
from cosmos_mcore.checkpoint.reader import MOMENTS, Checkpoint, FilesCheckpoint, FileTensor, TrainingState
from cosmos_mcore.checkpoint.torch_file import TensorSpec, TorchFile, TorchFileWriter

_STEP = "step"
_KINDS = ("model", "optim", "scheduler")  # of the files of each rank
_TRAINER_KEYS = {"iteration", "grad_scaler"}
# What torch's AdamW keeps per group, with its defaults.
_ADAMW: dict[str, Any] = {
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 1e-2,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
}


def is_trainer_file(file: TorchFile) -> bool:
    """Whether this is the ``iter_{N}.pt`` of a tensor-parallel checkpoint, which holds no tensors."""
    return isinstance(file.content, dict) and "iteration" in file.content and set(file.content) <= _TRAINER_KEYS


def has_optimizer(file: TorchFile) -> bool:
    """Whether this is a plain training checkpoint."""
    return isinstance(file.content, dict) and {"model", "optimizer", "iteration"} <= set(file.content)


def open_training(
    base: Path, trainer: TorchFile, ranks: Sequence[tuple[TorchFile, TorchFile, Mapping[str, Any]]], model_size: str
) -> FilesCheckpoint:
    """Opens a training checkpoint.

    Args:
        base: ``iter_{N}.pt``.
        trainer: that file.
        ranks: for each tensor-parallel rank the files with weights and with the optimizer, and the scheduler's state.
        model_size: as ``--model_size``.

    Raises:
        ValueError: if a file is damaged or does not fit the others.
    """
    weights = [state_dict(model) for model, _, _ in ranks]
    naming = naming_of(weights[0], ranks[0][0].path)
    if naming != "originals":
        raise ValueError(f"{base}: training checkpoints of the original's TE backend are not supported")
    checkpoint = FilesCheckpoint(base, "training", naming, weights, model_size)
    moments = []
    for tensors, (_, optimizer_file, _) in zip(weights, ranks, strict=True):
        shapes = {name: tuple(entry.tensor.shape) for name, entry in tensors.items()}
        moments.append(_moments(optimizer_file, checkpoint.names, shapes))
    optimizer = _optimizer(ranks[0][1])
    for value in optimizer["state"].values():
        if isinstance(value.get(_STEP), Tensor):
            ranks[0][1].check(value[_STEP], _STEP)
    steps = {float(value[_STEP]) for value in optimizer["state"].values() if _STEP in value}
    if len(steps) != 1:
        raise ValueError(f"{ranks[0][1].path}: the tensors' step counts differ: {sorted(steps)[:3]}")
    group = {key: value for key, value in optimizer["param_groups"][0].items() if key != "params"}
    checkpoint.add_training(TrainingState(int(trainer.content["iteration"]), steps.pop(), group, ranks[0][2]), moments)
    return checkpoint


def open_plain(file: TorchFile, model_size: str) -> FilesCheckpoint:
    """Opens ``iter_{N}.pt`` of a run without tensor parallelism; raises ValueError if it is damaged."""
    return open_training(file.path, file, [(file, file, file.content.get("scheduler") or {})], model_size)


def open_tensor_parallel(trainer: TorchFile, shards: Sequence[Path], model_size: str) -> FilesCheckpoint:
    """Opens ``iter_{N}.pt`` and the files of its ranks; raises ValueError if one is missing or damaged."""
    base, ranks = trainer.path, []
    for rank, path in enumerate(shards):
        scheduler = TorchFile(shard_path(base, rank, "scheduler")).content
        ranks.append((TorchFile(path), TorchFile(shard_path(base, rank, "optim")), scheduler))
    return open_training(base, trainer, ranks, model_size)


def write_training(
    checkpoint: Checkpoint,
    folder: Path,
    tensor_parallel_size: int = 1,
    force: bool = False,
    write_latest: bool = True,
) -> list[Path]:
    """Writes a training checkpoint with which the original resumes.

    Moments take the dtype of the weights, as the original has them.

    Args:
        checkpoint: weights and moments.
        folder: the original's ``checkpoints`` folder.
        tensor_parallel_size: of the run that is to resume.
        force: replace existing files.
        write_latest: also point ``latest_checkpoint.txt`` at it.

    Returns:
        The files.

    Raises:
        ValueError: if ``checkpoint`` has no moments, cannot be cut so, or an output exists.
    """
    if checkpoint.training is None:
        raise ValueError(f"{checkpoint.path} holds no optimizer state, so it cannot become a training checkpoint")
    check_tensor_parallel_size(checkpoint, tensor_parallel_size)
    if write_latest:  # it may name another checkpoint, of either format, from which a run is to go on
        refuse_existing([folder / LATEST], force)
    training, size = checkpoint.training, tensor_parallel_size
    base = folder / f"iter_{training.iteration:09d}.pt"
    stored = stored_tensors(checkpoint.arch, "originals")
    model = {PREFIX + name: spec for name, spec in part_specs(checkpoint, stored, size).items()}
    optimizer = _optimizer_structure(list(model.values()), training)
    scheduler = _scheduler(training)
    trainer = {"grad_scaler": {}, "iteration": training.iteration}
    if size == 1:
        files = [base]
        structures: list[Any] = [{"model": model, "optimizer": optimizer, "scheduler": scheduler, **trainer}]
    else:
        files = [shard_path(base, rank, kind) for kind in _KINDS for rank in range(size)]
        files.append(base)
        structures = [model] * size + [optimizer] * size + [scheduler] * size + [trainer]
    with new_files(files, force, stale=training_files(base)) as temporary, ExitStack() as stack:
        pairs = zip(temporary, structures, strict=True)
        writers = [stack.enter_context(TorchFileWriter(file, structure)) for file, structure in pairs]
        write_tensors(checkpoint, stored, writers[:size])
        _write_moments(checkpoint, writers[:size] if size == 1 else writers[size : 2 * size])
    if write_latest:
        with new_files([folder / LATEST], force=True) as (latest,):
            latest.write_text(base.name + "\n")
        flush(folder)
    return files


def training_files(base: Path) -> list[Path]:
    """The files of a training checkpoint that are there, however many ranks it is of; ``base`` ends in ``.pt``."""
    return [*([base] if base.exists() else []), *files_of_ranks(base, *_KINDS)]


def _optimizer(file: TorchFile) -> Mapping[str, Any]:
    content = file.content
    optimizer = content.get("optimizer", content) if isinstance(content, dict) else None
    if not (
        isinstance(optimizer, dict)
        and isinstance(optimizer.get("state"), dict)
        and isinstance(optimizer.get("param_groups"), list)
        and len(optimizer["param_groups"]) == 1
        and all(isinstance(value, dict) for value in optimizer["state"].values())
    ):
        raise ValueError(f"{file.path} does not hold the state of one AdamW optimizer")
    return optimizer


def _moments(
    file: TorchFile, names: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[tuple[str, str], FileTensor]:
    """Adam's moments of one rank: parameters are numbered in the order of the table."""
    state, moments = _optimizer(file)["state"], {}
    if set(state) != set(range(len(names))):
        raise ValueError(f"{file.path} holds optimizer state of {len(state)} tensors, but the model has {len(names)}")
    for index, name in enumerate(names):
        for moment in MOMENTS:
            tensor = state[index].get(moment)
            if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shapes[name]:
                found = list(tensor.shape) if isinstance(tensor, Tensor) else "missing"
                raise ValueError(f"{file.path}: {moment} of {name} is {found}, not {list(shapes[name])}")
            moments[moment, name] = FileTensor(tensor, file)
    return moments


def _optimizer_structure(specs: Sequence[TensorSpec], training: TrainingState) -> dict[str, Any]:
    scalar = TensorSpec((), torch.float32)
    given = training.param_group
    group = {key: given.get(key, default) for key, default in _ADAMW.items()}
    group["initial_lr"] = given.get("initial_lr", group["lr"])
    return {
        "state": {i: {_STEP: scalar, **dict.fromkeys(MOMENTS, spec)} for i, spec in enumerate(specs)},
        "param_groups": [{**group, "params": list(range(len(specs)))}],
    }


def _write_moments(checkpoint: Checkpoint, writers: Sequence[TorchFileWriter]) -> None:
    assert checkpoint.training is not None
    step = torch.tensor(float(checkpoint.training.step))
    for stored in stored_tensors(checkpoint.arch, "originals"):
        for writer in writers:
            writer.write(step)
        for moment in MOMENTS:
            tensor = checkpoint.read(stored.name, moment).to(checkpoint.dtype(stored.name))
            for rank, writer in enumerate(writers):
                writer.write(shard(tensor, stored.split_axis, rank, len(writers)))
            checkpoint.release(stored.name, moment)


def _scheduler(training: TrainingState) -> dict[str, Any]:
    """The original's own state, or the least that it continues from: it keeps what is not named."""
    lr = training.param_group.get("lr", 0.0)
    start = {"_step_count": training.iteration + 1, "_last_lr": [lr]}
    return {**start, **training.scheduler, "last_epoch": training.iteration}


def newest_checkpoint(folder: Path) -> Path | None:
    """What ``latest_checkpoint.txt`` of a run's folder, or of its ``checkpoints`` folder, names; None if there is none.

    Raises:
        ValueError: if it names something that is not in the folder.
    """
    for pointer in _pointers(folder):
        name = pointer.read_text(errors="replace").strip()
        if not re.fullmatch(r"[\w.-]+", name) or not (pointer.parent / name).exists():
            raise ValueError(f"{pointer} names {name!r}, which is not beside it")
        return pointer.parent / name
    return None


def _pointers(folder: Path) -> Iterator[Path]:
    for pointer in (folder / LATEST, folder / "checkpoints" / LATEST):
        if pointer.is_file():
            yield pointer
