"""Megatron-Core's plan of a save, without its ways of writing.

Megatron decides what is stored where; its writers are not used. Version 0.16 writes each file in a process forked from
the training process, whose threads (clips being decoded, TensorBoard) may hold locks at that moment; the fork never
releases them, and the save hangs. Its other worker, a spawned process, needs CUDA and outlives a rank that is killed.
Version 0.19 writes in threads with ``torch.save``, which keeps Python's lock for a whole tensor, so that training
stands still. ``background.py`` writes instead, and needs neither.
"""

from __future__ import annotations

import inspect
import io
import logging
import os
import queue
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import common, filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from cosmos_mcore.checkpoint.distributed_reader import COMMON
from cosmos_mcore.checkpoint.pieces import Box

_MEMORY = "/dev/shm"


@dataclass
class Plan:
    """What this rank has to store.

    Attributes:
        boxes: tensors.
        objects: pickled objects, with their places in the list of what is stored.
        files: small files that rank 0 adds.
        metadata: on rank 0: the list of what all ranks store; without where it lies, and without boxes added later.
        config: format and version, for ``metadata.json``.
    """

    boxes: list[Box] = field(default_factory=list)
    objects: list[tuple[MetadataIndex, bytes]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    metadata: Metadata | None = None
    config: CheckpointingConfig | None = None


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Stops Megatron's save after its plan, and keeps that."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: Any) -> AsyncRequest:
        self.buckets, self.metadata = writer.write_buckets, planned[1]
        return AsyncRequest(None, (), [])


def plan_save(state: dict[str, Any], check: bool) -> Plan:
    """Lets Megatron plan the save of a sharded state dict. All ranks call it; nothing is written.

    Args:
        state: the sharded state dict.
        check: let Megatron check that each part is stored exactly once; it depends on the layout only.
    """
    logging.getLogger("megatron.core.dist_checkpointing.strategies.torch").setLevel(logging.ERROR)
    make_queue = next(
        name for name in ("get_write_results_queue", "_get_write_results_queue") if hasattr(filesystem_async, name)
    )
    save = dist_checkpointing.save
    options = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}
    strategy = _PlanOnly("torch_dist", 1, thread_count=1)
    files: dict[str, bytes] = {}
    # Megatron wants a folder, and some versions put a small file there; a full disk must not end the save here, on one
    # rank alone. So the file goes elsewhere, and the folder is one in memory, which can be made on a full disk, too.
    # Megatron's queue would be a process of its own, which nobody needs.
    with (
        tempfile.TemporaryDirectory(prefix="cosmos_mcore_plan_", dir=_in_memory()) as folder,
        mock.patch.object(filesystem_async, make_queue, queue.Queue),
        _common_in(files),
    ):
        save(
            state,
            folder,
            sharded_strategy=strategy,
            validate_access_integrity=check,
            async_sharded_save=True,
            **options,
        )
    plan = Plan(files=files, metadata=strategy.metadata)
    plan.config = CheckpointingConfig(strategy.backend, strategy.version)
    if plan.metadata is not None and hasattr(plan.metadata, "all_local_plans"):
        del plan.metadata.all_local_plans  # large, and only for saves that reuse it
    for _, _, (objects, tensors) in strategy.buckets:
        plan.objects += [(item.index, data.getvalue()) for item, data in objects]
        plan.boxes += [_box(item, tensor) for item, tensor in tensors]
    return plan


def _in_memory() -> str | None:
    return _MEMORY if os.access(_MEMORY, os.W_OK) else None


@contextmanager
def _common_in(files: dict[str, bytes]) -> Iterator[None]:
    """Puts what some versions write to ``common.pt`` into ``files`` instead."""
    strategy = getattr(common, "TorchCommonSaveStrategy", None)
    if strategy is None:
        yield
        return

    def keep(_: Any, state: Any, folder: Any) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files[COMMON] = buffer.getvalue()

    with mock.patch.object(strategy, "save_common", keep):
        yield


def _box(item: Any, tensor: torch.Tensor) -> Box:
    chunk = item.tensor_data.chunk
    return Box(
        key=item.index.fqn,
        size=tuple(item.tensor_data.size),
        offsets=tuple(chunk.offsets),
        shape=tuple(chunk.sizes),
        data=tensor,
        dtype=tensor.dtype,
    )
