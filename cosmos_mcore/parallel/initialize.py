"""Process groups, device and seeds of a run."""

from __future__ import annotations

import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from cosmos_mcore.config.schema import ParallelConfig
from cosmos_mcore.parallel import cpu_mode

_replica_group: dist.ProcessGroup | None = None
_control_group: dist.ProcessGroup | None = None


def initialize(parallel: ParallelConfig, seed: int) -> torch.device:
    """Joins the process group, builds Megatron's parallel groups and seeds every generator.

    Reads torchrun's environment (``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``); without it the process is a run of its own.

    Returns:
        The device of this rank.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = cpu_mode.CPU
        cpu_mode.enable()
    timeout = timedelta(minutes=parallel.distributed_timeout_minutes)
    if not dist.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if "MASTER_PORT" not in os.environ:
            assert os.environ["WORLD_SIZE"] == "1", "torchrun sets MASTER_PORT"
            os.environ["MASTER_PORT"] = "0"  # torch picks a free port
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
        )  # no device_id: it would make NCCL's communicators of all of Megatron's groups at once, used or not
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        create_gloo_process_groups=False,  # a second set of groups that only Megatron's older checkpoints need
    )
    _make_groups(timeout)
    # Nothing in training draws random numbers (no dropout; weights and clips have generators of their own), so the
    # seeds only matter to user callbacks.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return device


def _make_groups(timeout: timedelta) -> None:
    """Groups the ranks that hold one model replica: equal data-parallel rank, any TP, PP, CP rank; and all hosts.

    Through gloo, on CPUs: the loader's threads send ids while training has the GPUs and their groups for itself.
    """
    global _replica_group, _control_group
    # In a dry run, one process plays all ranks and has no one to talk to.
    backend = None if dist.get_backend() == "fake" else "gloo"
    # Megatron numbers ranks with TP fastest, then CP, then DP, then PP.
    inner = parallel_state.get_tensor_model_parallel_world_size() * parallel_state.get_context_parallel_world_size()
    replicas = data_parallel_world_size()
    replica_of = [rank // inner % replicas for rank in range(dist.get_world_size())]
    assert replica_of[dist.get_rank()] == data_parallel_rank()
    for replica in range(replicas):
        members = [rank for rank, of in enumerate(replica_of) if of == replica]
        group = dist.new_group(members, timeout, backend=backend)
        if replica_of[dist.get_rank()] == replica:
            _replica_group = group
    _control_group = dist.new_group(timeout=timeout, backend=backend)


def control_group() -> dist.ProcessGroup:
    """All ranks, on gloo: for what the hosts agree on, so that no GPU has to wait for it."""
    assert _control_group is not None, "initialize() comes first"
    return _control_group


def replica_group() -> dist.ProcessGroup:
    """The ranks that together hold this rank's model replica (TP x PP x CP), through gloo; for loaders only."""
    assert _replica_group is not None, "initialize() comes first"
    return _replica_group


def data_parallel_rank() -> int:
    """Which replica this rank belongs to (context-parallel ranks share one)."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_world_size() -> int:
    """How many model replicas there are."""
    return parallel_state.get_data_parallel_world_size()


def shut_down() -> None:
    """Leaves all process groups, so that ``initialize`` can be called again."""
    global _replica_group, _control_group
    parallel_state.destroy_model_parallel()
    _replica_group = _control_group = None
    if dist.is_initialized():
        dist.destroy_process_group()
