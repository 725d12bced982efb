"""Going on from the newest checkpoint of a run that is undamaged."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.utils import log_single_rank

from cosmos_mcore.checkpoint.checksums import check_checksums
from cosmos_mcore.checkpoint.distributed import load_checkpoint
from cosmos_mcore.checkpoint.files import remove
from cosmos_mcore.checkpoint.pointer import LATEST, candidates, write_latest
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.parallel.agreement import errors_of_all, from_rank_zero

logger = logging.getLogger(__name__)


def resume(folder: Path, chunks: Sequence[CosmosARModel], optimizer: MegatronOptimizer) -> dict[str, Any] | None:
    """Loads the newest checkpoint, or where that is damaged the one before. All ranks.

    A damaged one is warned about and set aside as ``iter_N.damaged``, so that its number is free again.

    Returns:
        ``progress`` as it was saved; None if the run has no checkpoint.

    Raises:
        ValueError: if there are checkpoints, and none can be loaded.
    """
    first_error: str | None = None
    bad: list[Path] = []
    for path in from_rank_zero(candidates(folder) if dist.get_rank() == 0 else None):
        errors, _ = errors_of_all(partial(check_checksums, path, dist.get_rank(), dist.get_world_size()))
        if not errors:
            logger.info("resuming from %s", path)
            errors, progress = errors_of_all(partial(load_checkpoint, path, chunks, optimizer))
        if not errors:
            if dist.get_rank() == 0:
                _set_aside(folder, bad, path)
            return progress
        log_single_rank(
            logger, logging.WARNING, "checkpoint %s cannot be used; trying the one before: %s", path, errors[0]
        )
        known = errors[0].startswith("checkpoint ")
        first_error = first_error or (errors[0] if known else f"checkpoint {path} cannot be loaded: {errors[0]}")
        bad.append(path)
    if first_error is not None:
        raise ValueError(first_error)
    return None


def _set_aside(folder: Path, bad: Sequence[Path], good: Path) -> None:
    for path in bad:
        damaged = path.with_name(path.name + ".damaged")
        logger.warning("going on from %s; the damaged checkpoint is kept as %s", good, damaged)
        remove(damaged)
        os.replace(path, damaged)
    named = (folder / LATEST).read_text(errors="replace").strip()
    if named != good.name:
        logger.warning("%s named %s; it names %s now", folder / LATEST, named, good.name)
        write_latest(folder, good.name)
