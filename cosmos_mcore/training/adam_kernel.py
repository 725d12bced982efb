"""``training/adam.py``'s update as one Triton kernel: every byte is read once and written once."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cosmos_mcore.training.adam import Hyperparameters

_BLOCK = 2048


@triton.jit(do_not_specialize=["seed"])
def _update(
    weight_ptr, remainder_ptr, grad_ptr, first_ptr, second_ptr, norm_ptr, count,
    shrink, step_size, one_minus_beta1, beta2, one_minus_beta2, correction, eps, clip, seed,
    SPLIT: tl.constexpr, RANDOM: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # noqa: D103, N803
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(norm_ptr)
    # Where the norm is infinite or nan, nothing is read or written.
    inside = at < tl.where(tl.abs(norm) < float("inf"), count, 0)
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if CLIP:
        grad = grad * tl.minimum(clip / (norm + 1e-6), 1.0)
    first = tl.load(first_ptr + at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
    first = first + one_minus_beta1 * (grad - first)
    second = beta2 * second + one_minus_beta2 * grad * grad
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    if SPLIT:
        lower = tl.load(remainder_ptr + at, mask=inside, other=0).to(tl.int32)
        bits = (weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + lower
        master = bits.to(tl.float32, bitcast=True)
    else:
        master = weight
    master = master * shrink - step_size * (first / (tl.sqrt(second) * correction + eps))
    if SPLIT:
        bits = master.to(tl.int32, bitcast=True)
        upper = (bits + 0x8000) >> 16
        tl.store(weight_ptr + at, upper.to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(remainder_ptr + at, (bits - (upper << 16)).to(tl.int16), mask=inside)
    else:
        tl.store(weight_ptr + at, master, mask=inside)
    if RANDOM:
        noise = at.to(tl.uint32) * 0x9E3779B9 + seed.to(tl.uint32)
        noise = (noise ^ (noise >> 16)) * 0x85EBCA6B
        noise = (noise ^ (noise >> 13)) * 0xC2B2AE35
        noise = noise ^ (noise >> 16)
        first_bits = first.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)
        second_bits = second.to(tl.int32, bitcast=True) + (noise >> 16).to(tl.int32)
        tl.store(first_ptr + at, (first_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
        tl.store(second_ptr + at, (second_bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(first_ptr + at, first, mask=inside)
        tl.store(second_ptr + at, second, mask=inside)


def adam_update_triton(
    parameter: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_norm: Tensor,
    values: Hyperparameters
) -> None:  # fmt: skip
    """See ``adam_update``; all tensors contiguous and on one GPU."""
    count = parameter.numel()
    _update[(triton.cdiv(count, _BLOCK),)](
        parameter, remainder, grad, exp_avg, exp_avg_sq, grad_norm, count,
        1 - values.lr * values.weight_decay, values.step_size, 1 - values.beta1, values.beta2, 1 - values.beta2,
        values.second_moment_correction, values.eps, values.clip_grad, values.seed,
        SPLIT=remainder.element_size() == 2, RANDOM=exp_avg.element_size() == 2, CLIP=values.clip_grad > 0,
        BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
