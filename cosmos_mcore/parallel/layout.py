"""Checks a parallel layout before any process group is made. Imports no torch: the answer comes at once."""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_mcore.config.derived import data_parallel_size
from cosmos_mcore.config.schema import ParallelConfig, RunConfig


def model_parallel_size(config: RunConfig) -> int:
    """Processes that one model replica needs: TP x PP x CP."""
    parallel = config.parallel
    return parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size


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
    share = training.micro_batch_size * replicas
    if training.global_batch_size % share:
        raise ValueError(
            f"training.global_batch_size={training.global_batch_size} must be a multiple of micro_batch_size="
            f"{training.micro_batch_size} x {replicas} data-parallel replicas ({world_size} processes); try "
            f"training.global_batch_size={-(-training.global_batch_size // share) * share}"
        )


@dataclass(frozen=True)
class PipelineSplit:
    """How the layers are dealt to pipeline stages, in Megatron's terms."""

    embedding_counts: bool = False
    head_counts: bool = False


def pipeline_split(parallel: ParallelConfig, num_layers: int) -> PipelineSplit:
    """Deals layers evenly where that is possible, else counting the head, or embedding and head, as a layer each.

    At the widths of this family the output layer has about the weights and the work of one transformer layer.

    Raises:
        ValueError: if no split fits; names the nearest that does.
    """
    if (
        parallel.num_layers_in_first_pipeline_stage is not None
        or parallel.num_layers_in_last_pipeline_stage is not None
    ):
        _check_given_stages(parallel, num_layers)
        return PipelineSplit()
    stages = parallel.pipeline_model_parallel_size * (parallel.virtual_pipeline_model_parallel_size or 1)
    split = _even_split(stages, num_layers)
    if split is not None:
        return split
    sizes = range(min(parallel.pipeline_model_parallel_size, num_layers + 3) - 1, 1, -1)
    near = next((size for size in sizes if _even_split(size, num_layers) is not None), 1)
    raise ValueError(
        f"parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size} with {stages} stages in all "
        f"does not suit {num_layers} layers, with or without embedding and head; try pipeline_model_parallel_size="
        f"{near} without virtual stages, or set num_layers_in_first_pipeline_stage and "
        "num_layers_in_last_pipeline_stage"
    )


def _even_split(stages: int, num_layers: int) -> PipelineSplit | None:
    for embedding, head in ((False, False), (False, True), (True, True)):
        units = num_layers + embedding + head
        if units % stages == 0 and units >= 2 * stages * embedding:
            return PipelineSplit(embedding, head)
    return None


def stage_layers(parallel: ParallelConfig, num_layers: int) -> list[list[int]]:
    """Layers of each pipeline stage, as the sizes of its chunks: one, or several with virtual stages.

    Raises:
        ValueError: as ``pipeline_split``.
    """
    split = pipeline_split(parallel, num_layers)
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    units = num_layers - (first or 0) - (last or 0) + split.embedding_counts + split.head_counts
    others = units // max(1, stages - (first is not None) - (last is not None))
    sizes = [others if first is None else first, *[others] * (stages - 2), others if last is None else last][:stages]
    layers = [[size // virtual] * virtual for size in sizes]
    layers[0][0] -= split.embedding_counts
    layers[-1][-1] -= split.head_counts
    return layers


def _check_given_stages(parallel: ParallelConfig, num_layers: int) -> None:
    first, last = parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage
    middle = parallel.pipeline_model_parallel_size - (first is not None) - (last is not None)
    rest = num_layers - (first or 0) - (last or 0)
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    fits = rest == 0 if middle == 0 else rest > 0 and rest % (middle * virtual) == 0
    if parallel.pipeline_model_parallel_size == 1 or not fits or (first or 0) % virtual or (last or 0) % virtual:
        raise ValueError(
            f"parallel.num_layers_in_first_pipeline_stage={first} and num_layers_in_last_pipeline_stage={last} leave "
            f"{rest} of {num_layers} layers for {middle} other stages; change them so that the rest divides evenly"
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
        ValueError: naming the key to change and the nearest value that works.
    """
    parallel = config.parallel
    tp = parallel.tensor_model_parallel_size
    parts = {
        "query groups": num_query_groups,
        "attention heads": num_attention_heads,
        "feed-forward channels": ffn_hidden_size,
        "vocabulary rows": vocab_size,
    }
    for what, number in parts.items():
        if number % tp:
            near = max(n for n in range(1, min(tp, number + 1)) if all(part % n == 0 for part in parts.values()))
            raise ValueError(
                f"parallel.tensor_model_parallel_size={tp} does not divide the model's {number} {what}; try {near}"
            )
    if parallel.sequence_parallel and tp == 1:
        raise ValueError(
            "parallel.sequence_parallel=true needs tensor_model_parallel_size of at least 2; set it to false"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None:
        _check_virtual_stages(config, num_layers)
    pipeline_split(parallel, num_layers)


def _check_virtual_stages(config: RunConfig, num_layers: int) -> None:
    parallel, stages = config.parallel, config.parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_pipeline_model_parallel_size
    assert virtual is not None
    if stages == 1:
        raise ValueError(
            "parallel.virtual_pipeline_model_parallel_size needs pipeline_model_parallel_size of at least 2"
        )
    if virtual * stages > num_layers:
        raise ValueError(
            f"parallel.virtual_pipeline_model_parallel_size={virtual} x pipeline_model_parallel_size={stages} is more "
            f"than the model's {num_layers} layers; try virtual_pipeline_model_parallel_size={num_layers // stages}"
        )


def check_num_microbatches(config: RunConfig, microbatches: int) -> None:
    """Checks that an interleaved pipeline gets whole rounds of micro-batches.

    Raises:
        ValueError: naming a global batch size that fits.
    """
    parallel = config.parallel
    stages = parallel.pipeline_model_parallel_size
    if parallel.virtual_pipeline_model_parallel_size is not None and microbatches % stages:
        raise ValueError(
            f"an interleaved pipeline needs micro-batches in multiples of pipeline_model_parallel_size={stages}, and "
            f"there are {microbatches} per step; raise training.global_batch_size or set "
            "virtual_pipeline_model_parallel_size=null"
        )
