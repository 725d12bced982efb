"""AdamW in one pass over memory: clipping, update and float32 master weights out of two 16-bit halves.

A bf16 weight is the upper half of its float32 master weight, rounded; the lower half is kept beside it as an int16
remainder, so a master weight costs 2 bytes more, not 4. Moments are float32 or bf16; bf16 ones are rounded at random,
since ``0.999 v`` in bf16 is ``v`` again when rounded to nearest. The gradient's norm stays on the device: it scales the
gradient while it is read, and a norm that is not finite leaves everything as it was, without the host's knowing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MASTER, MOMENTS = "master_param", ("exp_avg", "exp_avg_sq")  # Megatron's names


@dataclass(frozen=True)
class Hyperparameters:
    """What one update of one tensor needs; source of the formula: Loshchilov and Hutter, arXiv:1711.05101.

    Attributes:
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; the weight shrinks by ``lr * weight_decay``.
        step: updates done, this one included.
        clip_grad: largest norm of the whole gradient; 0: no clipping.
        seed: of the random rounding of bf16 moments; another one for every tensor and step.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    clip_grad: float
    seed: int

    @property
    def step_size(self) -> float:
        """Learning rate with the first moment's bias correction."""
        return self.lr / (1 - self.beta1**self.step)

    @property
    def second_moment_correction(self) -> float:
        """Factor of the second moment's root."""
        return 1 / math.sqrt(1 - self.beta2**self.step)


class Adam:
    """AdamW as the inner optimizer of Megatron's ``DistributedOptimizer``.

    Reads ``decoupled_grad`` of its parameters and speaks Megatron's protocol for optimizers that hold the master
    weights themselves (``get_unscaled_state``, ``set_scaled_state``); states go in and out as float32, so a checkpoint
    does not depend on how they are held. Set ``grad_norm`` before ``step``. It is no ``torch.optim.Optimizer``, which
    refuses the views of parameters that Megatron hands it.
    """

    def __init__(self, param_groups: list[dict[str, Any]], *, clip_grad: float, moments_dtype: torch.dtype) -> None:
        """Allocates the state: 6 bytes per bf16 weight with bf16 moments, 10 with float32 ones.

        Args:
            param_groups: torch's: "params" (1-d bf16 or float32 tensors), "lr", "betas", "eps", "weight_decay".
            clip_grad: largest norm of the whole gradient; 0: no clipping.
            moments_dtype: float32 or bfloat16.
        """
        assert moments_dtype in (torch.float32, torch.bfloat16)
        self.param_groups, self.clip_grad = param_groups, clip_grad
        self.grad_norm: Tensor | None = None
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for group in param_groups:
            group["step"] = 0
            for parameter in group["params"]:
                remainder = torch.zeros_like(parameter, dtype=torch.int16)
                self.state[parameter] = {
                    MASTER: remainder if parameter.dtype is torch.bfloat16 else parameter.detach(),
                    **{name: torch.zeros_like(parameter, dtype=moments_dtype) for name in MOMENTS},
                }

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        assert self.grad_norm is not None, "set the gradient's norm first"
        number = 0
        for group in self.param_groups:
            group["step"] += 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                number += 1
                grad = getattr(parameter, "decoupled_grad", None)
                if grad is None:
                    continue
                values = Hyperparameters(
                    group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["step"], self.clip_grad,
                    seed=(group["step"] * 1_000_003 + number) % 2**31,
                )  # fmt: skip
                state = self.state[parameter]
                first, second = (state[name] for name in MOMENTS)
                adam_update(parameter.detach(), state[MASTER], grad, first, second, self.grad_norm, values)

    def get_unscaled_state(self, parameter: Tensor, name: str) -> Tensor:
        """A state as float32; the master weights out of their halves."""
        state = self.state[parameter][name]
        return join(parameter, state) if state.dtype is torch.int16 else state.float()

    def set_scaled_state(self, parameter: Tensor, name: str, value: Tensor) -> None:
        """Takes a state as float32; the master weights replace the parameter too."""
        state = self.state[parameter][name]
        if state.dtype is torch.int16:
            weight, remainder = split(value.to(parameter.device, torch.float32))
            parameter.detach().copy_(weight)
            state.copy_(remainder)
        else:
            state.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The groups' numbers; Megatron fetches the tensors one by one."""
        groups, first = [], 0
        for group in self.param_groups:
            count = len(group["params"])
            groups.append({**group, "params": list(range(first, first + count))})
            first += count
        # Where there is no Transformer Engine, Megatron looks for the step count in the parameters' states.
        steps = {0: {"step": torch.tensor(float(self.param_groups[0]["step"]))}} if self.param_groups else {}
        return {"state": steps, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the step counts. Rates and decay stay as the run's config has them."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group["step"] = int(saved["step"])


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 to (bf16 weight rounded to nearest, int16 remainder); ``join`` gives back every bit."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 master weight of a bf16 weight and its int16 remainder."""
    bits = (weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)
    return bits.view(torch.float32)


def adam_update(
    parameter: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_norm: Tensor,
    values: Hyperparameters
) -> None:  # fmt: skip
    """One update in place: a Triton kernel on GPUs, torch elsewhere.

    Args:
        parameter: [n] bf16 or float32.
        remainder: [n] int16 lower halves of a bf16 parameter; not read for a float32 one.
        grad: [n] bf16 or float32, not clipped.
        exp_avg: [n] float32 or bf16.
        exp_avg_sq: likewise.
        grad_norm: one float32 number on the device, the norm of the whole gradient.
        values: the numbers of this update.
    """
    if parameter.is_cuda:
        from cosmos_mcore.training.adam_kernel import adam_update_triton

        adam_update_triton(parameter, remainder, grad, exp_avg, exp_avg_sq, grad_norm, values)
    else:
        adam_update_torch(parameter, remainder, grad, exp_avg, exp_avg_sq, grad_norm, values)


def adam_update_torch(
    parameter: Tensor, remainder: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad_norm: Tensor,
    values: Hyperparameters
) -> None:  # fmt: skip
    """``adam_update`` in torch: the reference, and what runs on CPUs."""
    if not torch.isfinite(grad_norm):
        return
    gradient = grad.float()
    if values.clip_grad > 0:
        gradient = gradient * (values.clip_grad / (grad_norm + 1e-6)).clamp(max=1.0)
    first = torch.lerp(exp_avg.float(), gradient, 1 - values.beta1)
    second = values.beta2 * exp_avg_sq.float() + (1 - values.beta2) * gradient * gradient
    root = second.sqrt() * values.second_moment_correction + values.eps
    master = join(parameter, remainder) if parameter.dtype is torch.bfloat16 else parameter
    master = master * (1 - values.lr * values.weight_decay) - values.step_size * first / root
    if parameter.dtype is torch.bfloat16:
        weight, lower = split(master)
        parameter.copy_(weight)
        remainder.copy_(lower)
    else:
        parameter.copy_(master)
    if exp_avg.dtype is torch.bfloat16:
        noise = random_bits(len(parameter), values.seed, parameter.device)
        exp_avg.copy_(_round_at_random(first, noise & 0xFFFF))
        exp_avg_sq.copy_(_round_at_random(second, noise >> 16))
    else:
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)


def random_bits(count: int, seed: int, device: torch.device) -> Tensor:
    """[count] int64 numbers of 32 random bits: MurmurHash3's finalizer of (seed, index)."""
    mask = 0xFFFFFFFF
    bits = (torch.arange(count, device=device) * 0x9E3779B9 + seed) & mask
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & mask
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & mask
    return bits ^ (bits >> 16)


def _round_at_random(value: Tensor, noise: Tensor) -> Tensor:
    """Float32 to bf16, up with the probability that makes the mean exact."""
    return ((value.view(torch.int32) + noise.to(torch.int32)) >> 16).to(torch.int16).view(torch.bfloat16)
