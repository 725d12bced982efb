"""Checks a parallel layout before any process group is made. Imports no torch: the answer comes at once."""

from __future__ import annotations

from cosmos_mcore.config.derived import data_parallel_size
from cosmos_mcore.config.schema import RunConfig


def model_parallel_size(config: RunConfig) -> int:
    """Processes that one model replica needs: TP x PP x CP."""
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )


def check_world_size(config: RunConfig, world_size: int) -> None:
    """Checks that ``world_size`` processes hold whole replicas that share the global batch.

    Raises:
        ValueError: naming the keys to change.
    """
    parallel, training = config.parallel, config.training
    size = model_parallel_size(config)
    split = (
        f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size} x "
        f"pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} x "
        f"context_parallel_size={parallel.context_parallel_size}"
    )
    if world_size % size:
        raise ValueError(f"{split} needs a multiple of {size} processes, but there are {world_size}: change the layout")
    replicas = data_parallel_size(config, world_size)
    if training.global_batch_size % (training.micro_batch_size * replicas):
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size} must be a multiple of micro_batch_size="
            f"{training.micro_batch_size} x {replicas} data-parallel replicas ({world_size} processes)"
        )


def check_layout(
    config: RunConfig,
    *,
    num_layers: int,
    num_attention_heads: int,
    num_query_groups: int,
    ffn_hidden_size: int,
    vocab_size: int,
) -> None:
    """Checks that the model can be cut as ``config.parallel`` says.

    Raises:
        ValueError: naming the key to change and values that work.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for what, number in (
        ("query groups", num_query_groups),
        ("attention heads", num_attention_heads),
        ("feed-forward channels", ffn_hidden_size),
        ("vocabulary rows", vocab_size),
    ):
        if number % tp:
            fits = [n for n in range(1, tp) if num_query_groups % n == 0 and ffn_hidden_size % n == 0]
            raise ValueError(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {number} {what}; try {fits[-1]}"
            )
    if parallel.sequence_parallel and tp == 1:
        raise ValueError("parallel.sequence_parallel=true needs tensor_model_parallel_size of at least 2; set it to false")
    stages = pp * (parallel.virtual_pipeline_model_parallel_size or 1)
    if num_layers % stages:
        raise ValueError(
            f"parallel.pipeline_model_parallel_size={pp} (with virtual stages {stages} in all) does not divide the model's "
            f"{num_layers} layers; try pipeline_model_parallel_size="
            f"{max(n for n in range(1, pp + 1) if num_layers % n == 0)}"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None and pp == 1:
        raise ValueError("parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of at least 2")
