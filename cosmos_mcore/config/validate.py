"""Checks of a config's values that need no torch, no files and no world size."""

from __future__ import annotations

from operator import attrgetter

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.config.values import accepts, leaf_kinds, mismatch


def validate(config: RunConfig) -> None:
    """Checks types and ranges of all keys (as annotated in ``schema.py``), then what keys demand of each other.

    Not what the model's sizes and the number of processes demand of the layout: see ``parallel/layout.py``.
    ``load_config`` has done it already; a config that code has built or changed needs the call.

    Raises:
        ValueError: one sentence that names the key and what to do.
    """
    for key, kind in leaf_kinds(RunConfig).items():
        value = attrgetter(key)(config)
        if not accepts(kind, value):
            raise ValueError(mismatch(key, kind, value))
    derive_video_layout(config)
    _check_tokenizer(config)
    _check_data(config)
    _check_parallel(config)
    _check_precision(config)
    _check_schedule(config)
    _check_batch(config)
    _check_sampling(config)
    start, end = config.logging.profile_step_start, config.logging.profile_step_end
    if (start is None) != (end is None) or (start is not None and end is not None and start >= end):
        raise ValueError(
            "logging.profile_step_start and logging.profile_step_end go together, the second larger than the first"
        )
    if config.checkpoint.keep_every is not None and config.checkpoint.keep is None:
        raise ValueError("checkpoint.keep_every needs checkpoint.keep; without it all checkpoints stay")


def _check_tokenizer(config: RunConfig) -> None:
    if config.tokenizer.name != "haar" and config.tokenizer.path is None:
        raise ValueError(
            f"tokenizer.name={config.tokenizer.name} needs tokenizer.path, the folder with its weights; "
            "tokenizer.name=haar needs none"
        )
    if config.tokenizer.name == "haar" and config.tokenizer.engine != "eager":
        raise ValueError(
            f"tokenizer.engine={config.tokenizer.engine} needs tokenizer.name=dv8x16x16, which has files to run"
        )


def _check_data(config: RunConfig) -> None:
    data = config.data
    entries = len(data.path) if isinstance(data.path, list) else 1
    if data.weights is not None and len(data.weights) != entries:
        raise ValueError(f"data.weights has {len(data.weights)} numbers, data.path {entries} entries; give as many")


def _check_parallel(config: RunConfig) -> None:
    parallel = config.parallel
    if parallel.overlap_param_gather and not (parallel.use_distributed_optimizer and parallel.overlap_grad_reduce):
        raise ValueError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true and "
            "parallel.overlap_grad_reduce=true"
        )


def _check_precision(config: RunConfig) -> None:
    _check_fp8(config)
    precision, parallel = config.precision, config.parallel
    for key in ("main_grads", "moments"):
        if getattr(precision, key) == "bf16" and not (precision.dtype == "bf16" and parallel.use_distributed_optimizer):
            raise ValueError(
                f"precision.{key}=bf16 needs precision.dtype=bf16 and parallel.use_distributed_optimizer=true"
            )
    if parallel.recompute_num_layers is not None and parallel.recompute_granularity != "full":
        raise ValueError("parallel.recompute_num_layers needs parallel.recompute_granularity=full")


def _check_fp8(config: RunConfig) -> None:
    precision = config.precision
    if precision.fp8 is not None and precision.dtype != "bf16":
        raise ValueError(f"precision.fp8={precision.fp8} needs precision.dtype=bf16")
    if any(precision.fp8_first_last_bf16) and precision.fp8 in (None, "delayed"):
        raise ValueError(
            f"precision.fp8_first_last_bf16={precision.fp8_first_last_bf16} needs precision.fp8 to be tensorwise, "
            "blockwise or mxfp8 (Megatron's delayed scaling covers all layers); set it to [0, 0]"
        )


def _check_schedule(config: RunConfig) -> None:
    if config.schedule.min_lr > config.optimizer.lr:
        raise ValueError(
            f"schedule.min_lr={config.schedule.min_lr} must not exceed optimizer.lr={config.optimizer.lr}; lower it"
        )
    if config.schedule.cooldown_iters is not None and config.schedule.name != "lambda_linear":
        raise ValueError("schedule.cooldown_iters needs schedule.name=lambda_linear; warmup_cosine ends at min_lr")


def _check_sampling(config: RunConfig) -> None:
    if config.logging.sample_interval is None:
        return
    if config.parallel.pipeline_model_parallel_size > 1:
        raise ValueError(
            "logging.sample_interval needs parallel.pipeline_model_parallel_size=1, since a stage has only some of the "
            "weights; set it to null and generate from a checkpoint"
        )
    if derive_video_layout(config).latent_shape[0] == 1:
        raise ValueError(
            "logging.sample_interval needs clips of more than one latent frame: there is nothing to continue in an "
            "image; set it to null"
        )


def _check_batch(config: RunConfig) -> None:
    whole, micro = config.training.global_batch_size, config.training.micro_batch_size
    if whole % micro:
        raise ValueError(
            f"training.global_batch_size={whole} must be a multiple of training.micro_batch_size={micro}; "
            f"try training.global_batch_size={-(-whole // micro) * micro}"
        )
