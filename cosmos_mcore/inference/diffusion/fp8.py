"""The diffusion decoder's matrix products in 8-bit floating point: weights and inputs rounded, a scale for each row.

An input is rounded together with what makes it (norm, GELU): on a GPU by one compiled kernel, which writes half the
bytes. Sums are float32 within a product and come out in the dtype that the layer had.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mcore.inference.weights import FP8, quantize

_MAX = torch.finfo(FP8).max
_TINY = torch.finfo(torch.float32).tiny


class Rounded(NamedTuple):
    """Numbers in 8 bits: ``data`` [..., K] times ``scale`` [..., 1] float32."""

    data: Tensor
    scale: Tensor


class Fp8Linear(nn.Module):
    """Takes the place of a linear layer without biases."""

    data: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = quantize(layer.weight.detach())
        assert weight.scale is not None
        self.dtype = layer.weight.dtype
        self.register_buffer("data", weight.data)
        self.register_buffer("scale", weight.scale)

    def forward(self, x: Tensor | Rounded) -> Tensor:
        """[..., K] to [..., N]."""
        data, scale = x if isinstance(x, Rounded) else _for(x.is_cuda, _round)(x)
        shape = (*data.shape[:-1], len(self.data))
        data, scale = data.flatten(0, -2), scale.flatten(0, -2)
        if not data.is_cuda:
            weight = self.data.float() * self.scale[:, None]
            return F.linear(data.float() * scale, weight).to(self.dtype).view(shape)
        scales = {"scale_a": scale, "scale_b": self.scale[None]}
        out = torch._scaled_mm(data, self.data.t(), **scales, out_dtype=self.dtype, use_fast_accum=True)
        return out.view(shape)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Rounded:
    """Layer norm of ``x`` [..., K], times one plus the scale, plus the shift."""
    return Rounded(*_for(x.is_cuda, _norm_and_round)(x, shift, scale, eps))


def with_gelu(layer: nn.Module, x: Tensor | Rounded) -> Rounded:
    """GELU of a layer's product with ``x``."""
    product = layer(x)
    return Rounded(*_for(product.is_cuda, _gelu_and_round)(product))


def _round(values: Tensor) -> tuple[Tensor, Tensor]:
    values = values.float()
    scale = (values.abs().amax(-1, keepdim=True) / _MAX).clamp_min(_TINY)
    return (values / scale).clamp(-_MAX, _MAX).to(FP8), scale


def _norm_and_round(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _round(F.layer_norm(x, x.shape[-1:], 1 + scale, shift, eps))


def _gelu_and_round(x: Tensor) -> tuple[Tensor, Tensor]:
    return _round(F.gelu(x))


@cache
def _for(cuda: bool, function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(function) if cuda else function
