"""AdamW on Megatron's optimizers: built from the config, and one update without waiting for the device."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import DTYPES
from cosmos_mcore.training.adam import Adam


def build_optimizer(config: RunConfig, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW over all parameters of ``model``, every one of them decayed (spec/training.md section 2).

    The distributed optimizer gets our ``Adam`` inside, which holds the master weights; without it the optimizer is
    Megatron's own.
    """
    settings, dtype = config.optimizer, DTYPES[config.precision.dtype]
    distributed = config.parallel.use_distributed_optimizer
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
        use_distributed_optimizer=distributed,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    # Megatron's word for "the inner optimizer holds the master weights". Its public switch for it demands Transformer
    # Engine's FusedAdam, whose place our Adam takes.
    megatron_config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = distributed
    # An empty dict switches off Megatron's habit of not decaying one-dimensional parameters.
    optimizer = get_megatron_optimizer(megatron_config, model, config_overrides={}, use_gloo_process_groups=False)
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            moments = DTYPES[config.precision.moments]
            part.optimizer = Adam(part.optimizer.param_groups, clip_grad=settings.clip_grad, moments_dtype=moments)
    for group in optimizer.param_groups:
        # Megatron finds a checkpoint's groups by these numbers, so that a run could not be resumed with another rate.
        for name in ("max_lr", "min_lr"):
            group.pop(name, None)
        group["initial_lr"] = settings.lr  # torch's name, for the original's files
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Sets the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def update(optimizer: MegatronOptimizer) -> Tensor:
    """Clips and updates once the gradients are complete; with our ``Adam`` nothing waits for the device.

    Returns:
        Float32 [1] on the device: norm of the whole model's gradient before clipping. If it is not finite, no weight
        has changed.
    """
    parts = _parts(optimizer)
    if not all(isinstance(part, DistributedOptimizer) for part in parts):
        (part,) = parts
        optimizer.prepare_grads()
        clip_grad = part.config.clip_grad
        norm = part.clip_grad_norm(clip_grad) if clip_grad > 0 else part.get_grad_norm()
        if math.isfinite(norm):
            optimizer.step_with_ready_grads()
        optimizer.zero_grad()  # forgets the gradient buffers, which it has taken for gradients of its own
        return torch.tensor([float(norm)], device=torch.cuda.current_device())
    optimizer.prepare_grads()
    norm = _grad_norm(parts)
    for part in parts:
        part.optimizer.grad_norm = norm
    optimizer.step_with_ready_grads()
    return norm


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _grad_norm(parts: list[MegatronOptimizer]) -> Tensor:
    """Every element of the whole model's gradient counts once, whatever the layout."""
    total = torch.zeros(1, device=torch.cuda.current_device())
    for part in parts:
        grads = [
            parameter.decoupled_grad
            for parameter in part.get_parameters()
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        squares = torch.zeros_like(total)
        if grads:
            # On CPUs a float32 norm over millions of elements would depend on how they are split over ranks.
            dtype = torch.float32 if total.is_cuda else torch.float64
            norms = torch._foreach_norm(grads, 2, dtype=dtype)
            squares += torch.stack(norms).square().sum()
        dist.all_reduce(squares, group=part.get_grad_stats_parallel_group())
        total += squares
    return total.sqrt()
