"""AdamW on Megatron's optimizers, and what they need to save and load without Transformer Engine or Apex."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import DTYPES


def build_optimizer(config: RunConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over all parameters of ``model``, every one of them decayed (spec/training.md section 2)."""
    settings, dtype = config.optimizer, DTYPES[config.precision.dtype]
    megatron_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    # An empty dict switches off Megatron's habit of not decaying one-dimensional parameters.
    return get_megatron_optimizer(megatron_config, model, config_overrides={}, use_gloo_process_groups=False)


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Sets the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
