"""Draws the next token from logits, in float32 (spec/inference.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALLEST_TEMPERATURE = 1e-5
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy, ``top_p`` and ``top_k`` play no part).
        top_p: keeps the most likely tokens up to the one that brings their sum above this probability, and ties of it.
        top_k: keeps this many of the most likely tokens, and ties of the last of them. Applied before ``top_p``.
    """

    temperature: float = 1.0
    top_p: float | None = 0.8
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for values that make no distribution."""
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie between 0 and 1")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")


def kept_probabilities(logits: Tensor, options: SamplingOptions) -> Tensor:
    """Probabilities of the tokens that may be drawn.

    A token is dropped when the sum of the more likely ones exceeds ``top_p``, so the most likely one always stays.

    Args:
        logits: [B, V], any float dtype.
        options: with a temperature above 0.

    Returns:
        [B, V] float32, 0 where dropped, each row adding up to 1.
    """
    scaled = logits.float() / max(options.temperature, SMALLEST_TEMPERATURE)
    if options.top_k is not None and options.top_k < scaled.size(-1):
        last = scaled.topk(options.top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < last, float("-inf"))
    probabilities = scaled.softmax(-1)
    if options.top_p is not None:
        ranked = probabilities.sort(dim=-1, descending=True).values
        kept = (ranked.cumsum(-1) - ranked <= options.top_p).sum(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < ranked.gather(-1, kept - 1), 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def pick(probabilities: Tensor, noise: Tensor) -> Tensor:
    """Draws one id per row: the largest ratio of probability to exponential noise (the Gumbel trick).

    Args:
        probabilities: [B, V] float32.
        noise: [B, V] float32, independent draws of the exponential distribution with rate 1.

    Returns:
        Token ids [B] int64.
    """
    return (probabilities / noise).argmax(-1)


def exponential_noise(seeds: Tensor, position: int, size: int) -> Tensor:
    """Noise [B, size] float32 that depends on each row's seed and on the position alone, not on the batch.

    Args:
        seeds: [B] int64, not negative, on the CPU.
        position: of the token to draw, at least 0.
        size: of the vocabulary.
    """
    # Philox counts: the position takes the place of everything that was drawn before.
    rows = [
        np.random.Generator(np.random.Philox(key=seed, counter=position << 64)).standard_exponential(size, np.float32)
        for seed in seeds.tolist()
    ]
    # Rounding can give a noise of exactly 0, which would turn a dropped token's ratio into 0/0.
    return torch.from_numpy(np.stack(rows)).clamp_min(_TINY)


def sample_tokens(logits: Tensor, options: SamplingOptions, seeds: Tensor, position: int) -> Tensor:
    """Chooses one token per row of ``logits`` [B, V] on the CPU; arguments as of ``exponential_noise``.

    Returns:
        Token ids [B] int64.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    return pick(kept_probabilities(logits, options), exponential_noise(seeds, position, logits.size(-1)))
