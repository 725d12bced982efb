"""Emptying the gradient buffers, without a pass over those that the backward pass overwrites anyway."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import is_te_min_version

_OVERWRITE = "overwrite_main_grad"  # Transformer Engine's attribute of weights


def mark_overwritten_gradients(model: Sequence[DistributedDataParallel], num_microbatches: int) -> None:
    """Lets matrix products write weight gradients instead of adding to them, where one micro-batch is all of a step.

    Saves setting the buffer to zero and reading it in every product. Transformer Engine does it for weights that carry
    its mark; versions that are not known to respect the mark add to the old gradient, so they get none.

    Args:
        model: this rank's chunks.
        num_microbatches: micro-batches that each replica runs per step.
    """
    fused = model[0].config.gradient_accumulation_fusion
    if num_microbatches > 1 or not fused or not is_te_min_version("2.20.0"):
        return
    for chunk in model:
        for module in chunk.modules():
            if getattr(module, "fuse_wgrad_accumulation", False):
                setattr(module.weight, _OVERWRITE, True)


def zero_gradients(model: Sequence[DistributedDataParallel]) -> None:
    """Prepares the gradient buffers for a step."""
    for chunk in model:
        marked = [parameter for parameter in chunk.params_with_grad if getattr(parameter, _OVERWRITE, False)]
        if not marked:
            chunk.zero_grad_buffer()
            continue
        for parameter in chunk.params_with_grad:
            parameter.grad_added_to_main_grad = False
            if not getattr(parameter, _OVERWRITE, False):
                parameter.main_grad.zero_()
        for group in chunk.bucket_groups:
            group.reset()
