"""Floating-point operations of a training step, by the convention that all figures in ``docs/`` use."""

from __future__ import annotations

import math

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config.derived import TEXT_LENGTH
from cosmos_mcore.model.presets import ModelArch

_PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}  # dense bf16 TFLOP/s, by NVIDIA's data sheets


def peak_tflops(device_name: str) -> float | None:
    """What a GPU can do in bf16, whatever the run computes in; None if it is not known."""
    return next((peak for name, peak in _PEAKS.items() if name in device_name), None)


def num_parameters(arch: ModelArch, with_embedding: bool = True) -> int:
    """Parameters of the whole model, with or without the input embedding."""
    shapes = original_shapes(arch)
    return sum(math.prod(s) for name, s in shapes.items() if with_embedding or name != "tok_embeddings.weight")


def flops_per_clip(arch: ModelArch, sequence_length: int) -> float:
    """Forward and backward of one clip: 6 N S without the input embedding, plus causal attention 6 L S^2 width.

    In text-to-video models, keys and values of the text are made from its rows, not from the clip's, and every token
    attends to all of them. Padding of the clip does not count: it is work, but not useful work.
    """
    width = arch.num_attention_heads * arch.kv_channels
    matmuls = 6 * num_parameters(arch, with_embedding=False) * sequence_length
    attention = 6 * arch.num_layers * sequence_length**2 * width
    if arch.context_size is not None:
        keys_and_values = arch.context_size * 2 * arch.num_query_groups * arch.kv_channels
        matmuls -= 6 * arch.num_layers * keys_and_values * (sequence_length - TEXT_LENGTH)
        attention += 12 * arch.num_layers * sequence_length * TEXT_LENGTH * width
    return matmuls + attention
