"""The run's own checkpoints: Megatron's distributed format, which any parallel layout can load.

Writing is the work of ``background.py``; here are what to write, and loading.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from unittest import mock

import megatron.core
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch.distributed.checkpoint.api import CheckpointException

from cosmos_mcore.checkpoint.architecture import check_tensors
from cosmos_mcore.checkpoint.background import BackgroundSave
from cosmos_mcore.checkpoint.distributed_reader import DistributedCheckpoint
from cosmos_mcore.checkpoint.megatron_plan import Plan, plan_save
from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.checkpoint.pieces import Box, distributed_optimizers, optimizer_boxes
from cosmos_mcore.checkpoint.pointer import complete_checkpoints, is_distributed, iteration_of, latest_checkpoint
from cosmos_mcore.checkpoint.training_folder import training_files
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel

logger = logging.getLogger(__name__)

# The only sharding of the optimizer's state that every other layout can load.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

# What Megatron and torch raise for damaged files; AttributeError comes from a mistake in Megatron 0.16's own report.
_LOAD_ERRORS = (
    CheckpointingException,
    CheckpointException,
    AttributeError,
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    UnpicklingError,
    ValueError,
)


def save_checkpoint(
    folder: Path,
    iteration: int,
    chunks: Sequence[CosmosARModel],
    optimizer: MegatronOptimizer,
    progress: dict[str, Any],
) -> Path:
    """Writes ``folder/iter_{iteration}`` from all ranks, moves ``latest_checkpoint.txt`` on and returns then.

    Args:
        folder: the run's ``checkpoints`` folder.
        iteration: optimizer steps done.
        chunks: this rank's model chunks.
        optimizer: its optimizer.
        progress: plain numbers to come back from ``load_checkpoint``.

    Returns:
        The checkpoint's folder.

    Raises:
        OSError: if it cannot be written.
    """
    save = BackgroundSave(folder)
    result = save.start(iteration, lambda: plan_checkpoint(chunks, optimizer, progress)) or save.wait()
    assert result is not None
    save.close()
    if result.errors:
        raise OSError(f"{result.path} cannot be written: {'; '.join(result.errors)}")
    return result.path


def plan_checkpoint(
    chunks: Sequence[CosmosARModel], optimizer: MegatronOptimizer, progress: dict[str, Any], check: bool = True
) -> tuple[Plan, list[Box]]:
    """What this rank has to store: all of it, with a part that Megatron's own list lacks. All ranks; nothing is copied.

    Args:
        chunks: this rank's model chunks.
        optimizer: its optimizer.
        progress: plain numbers to come back from ``load_checkpoint``.
        check: let Megatron check the split over ranks, which depends on the layout only.
    """
    state = {"progress": dict(progress), **_model_state(chunks)}
    spread = distributed_optimizers(optimizer)
    boxes = [box for one in spread for box in optimizer_boxes(one, _models(state))]
    with ExitStack() as stack:
        # Megatron collects garbage after its copies, which are not made here: training would wait for that most of all.
        stack.enter_context(mock.patch.object(distrib_optimizer, "gc"))
        for one in spread:  # Megatron would gather these tensors on every rank
            stack.enter_context(mock.patch.object(one, "sharded_param_state_fully_reshardable", lambda *_: {}))
        state["optimizer"] = _optimizer_state(optimizer, state, is_loading=False)
    return plan_save(state, check), boxes


def remove_old_checkpoints(folder: Path, keep: int, keep_every: int | None = None, exports: bool = False) -> None:
    """Deletes old checkpoints that are complete, never the one that ``latest_checkpoint.txt`` names, nor later ones.

    Later ones are there if a run was sent back; they do not count among its newest, and it replaces them in time.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep: how many of the newest stay.
        keep_every: those of its multiples stay, too.
        exports: delete the original's files beside a checkpoint with it.
    """
    latest = latest_checkpoint(folder)
    complete = [path for path in complete_checkpoints(folder) if latest is None or path.name <= latest.name]
    for path in complete[:-keep]:
        if path != latest and not (keep_every and iteration_of(path) % keep_every == 0):
            for file in training_files(path.with_name(path.name + ".pt")) if exports else ():
                file.unlink()
            # Under another name it is no checkpoint any more, however far the removal gets.
            doomed = path.with_name(path.name + ".removed")
            os.replace(path, doomed)
            shutil.rmtree(doomed)
            logger.info("removed old checkpoint %s", path)


def load_weights(path: Path, chunks: Sequence[CosmosARModel]) -> None:
    """Loads only the weights of a distributed checkpoint into this rank's chunks.

    Raises:
        ValueError: if it cannot be read or holds another model.
    """
    _check_model(path, chunks)
    with _one_line(path):
        state = dist_checkpointing.load(_stored_part(_model_state(chunks), path, fp8_state=False), str(path))
        _set_model(chunks, state)


def load_checkpoint(path: Path, chunks: Sequence[CosmosARModel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Loads weights and optimizer state, whatever layout saved them.

    Returns:
        ``progress`` as it was given to ``save_checkpoint``.

    Raises:
        ValueError: if it cannot be read or holds another model.
    """
    _check_model(path, chunks)
    with _one_line(path):
        # Only delayed scaling has a state: the largest values of the last steps. Other recipes begin afresh each step.
        model_config = chunks[0].config
        delayed = bool(model_config.fp8) and model_config.fp8_recipe == "delayed"
        state = _stored_part(_model_state(chunks), path, fp8_state=delayed)
        state["optimizer"] = _optimizer_state(optimizer, state, is_loading=True)
        loaded = dist_checkpointing.load(state, str(path))
        with _own_fp8_state():
            _set_model(chunks, loaded)
        with torch.no_grad():
            optimizer.load_state_dict(loaded["optimizer"])
        return dist_checkpointing.load_common_state_dict(str(path))["progress"]


def _check_model(path: Path, chunks: Sequence[CosmosARModel]) -> None:
    """Sees that the checkpoint holds the tensors of the whole model, no more and no less, in their sizes.

    Megatron would cut off or fill up a vocabulary of another size, and leave out what the model does not have.
    """
    try:
        checkpoint = DistributedCheckpoint(path)
    except ValueError as error:
        raise ValueError(f"checkpoint {path} cannot be loaded: {error}") from None
    if checkpoint.newer_than_common and hasattr(common, "TorchCommonLoadStrategy"):
        raise ValueError(
            f"checkpoint {path} was written by megatron-core 0.19 or newer, and {megatron.core.__version__} cannot "
            "load it; use Python 3.12 or newer, or take the weights: scripts/convert_checkpoint.py --to safetensors"
        )
    found = original_shapes(checkpoint.arch)
    check_tensors(found, original_shapes(chunks[0].arch), f"checkpoint {path} is not of the configured model")


def _model_state(chunks: Sequence[CosmosARModel]) -> dict[str, Any]:
    metadata = ensure_metadata_has_dp_cp_group(dict(_METADATA))
    return {f"model{i}": chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def _stored_part(state: dict[str, Any], path: Path, fp8_state: bool) -> dict[str, Any]:
    """Without the objects (``_extra_state``) that nobody wants or that the checkpoint lacks, as converted ones do."""
    stored = dist_checkpointing.serialization.load_sharded_metadata(str(path)) if fp8_state else {}

    def wanted(value: Any) -> bool:
        return not isinstance(value, ShardedObject) or value.unique_key in stored

    return {chunk: {k: v for k, v in part.items() if wanted(v)} for chunk, part in state.items()}


@contextmanager
def _own_fp8_state() -> Iterator[None]:
    """Lets Transformer Engine unpickle the FP8 state of the run's own checkpoint, which it refuses without being told.

    Weights from elsewhere come in without any such state (``load_weights``).
    """
    name = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _models(state: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in state.items() if name.startswith("model")}


def _optimizer_state(optimizer: MegatronOptimizer, model_state: dict[str, Any], is_loading: bool) -> Any:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    models = _models(model_state)
    # Megatron looks up parameters in one flat dict, or in one dict per chunk.
    return optimizer.sharded_state_dict(
        models if len(models) > 1 else models["model0"],
        is_loading=is_loading,
        metadata={**_METADATA, "dp_cp_group": group},
    )


def _set_model(chunks: Sequence[CosmosARModel], state: dict[str, Any]) -> None:
    for i, chunk in enumerate(chunks):
        result = chunk.load_state_dict(state[f"model{i}"], strict=False)
        wrong = [name for name in result.missing_keys + result.unexpected_keys if "_extra_state" not in name]
        assert not wrong, f"the sharded state dict and the model disagree on {wrong}"


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Turns what Megatron and torch raise for a bad checkpoint into one sentence."""
    if not is_distributed(path):
        raise ValueError(f"{path} is not a distributed checkpoint: metadata.json is missing; give an iter_... folder")
    try:
        yield
    except _LOAD_ERRORS as error:
        first = str(error).strip().splitlines()
        detail = f"{type(error).__name__}: {first[0][:300]}" if first else type(error).__name__
        logger.debug("loading %s failed", path, exc_info=True)
        raise ValueError(
            f"checkpoint {path} cannot be loaded into this model with megatron-core {megatron.core.__version__}: "
            f"{detail}"
        ) from error
