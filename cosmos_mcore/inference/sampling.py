"""Draws the next token from logits, in float32 (spec/inference.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token (greedy, ``top_p`` and ``top_k`` play no part).
        top_p: keeps the most likely tokens up to the one that brings their sum above this probability.
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


def ranked_probabilities(logits: torch.Tensor, options: SamplingOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the tokens that may be drawn, most likely first.

    A token is dropped when the sum of those before it exceeds ``top_p``, so the first one always stays
    (spec/inference.md section 4).

    Args:
        logits: [B, V], any float dtype.
        options: with a temperature above 0.

    Returns:
        Probabilities [B, V] float32, 0 where dropped, each row adding up to 1, and their token ids [B, V] int64.
    """
    scaled = logits.float() / max(options.temperature, SMALLEST_TEMPERATURE)
    scaled, ids = scaled.sort(dim=-1, descending=True, stable=True)
    if options.top_k is not None and options.top_k < scaled.size(-1):
        scaled = scaled.masked_fill(scaled < scaled[:, options.top_k - 1, None], float("-inf"))
    probabilities = scaled.softmax(-1)
    if options.top_p is not None:
        preceding = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(preceding > options.top_p, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def pick(probabilities: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draws one id per row: the largest ratio of probability to exponential noise (the Gumbel trick).

    Args:
        probabilities: [B, V] float32, most likely first.
        ids: [B, V] int64, their token ids, as ``ranked_probabilities`` returns them.
        noise: [B, V] float32, independent draws of the exponential distribution with rate 1.

    Returns:
        Token ids [B] int64.
    """
    rank = (probabilities / noise).argmax(-1, keepdim=True)
    return ids.gather(-1, rank).squeeze(-1)


def sample_tokens(
    logits: torch.Tensor, options: SamplingOptions, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Chooses one token per row of ``logits``.

    The same generator state and logits give the same token; nothing else is random.

    Args:
        logits: [B, V], any float dtype.
        options: how to choose.
        generator: on the device of ``logits``; None: torch's default one.

    Returns:
        Token ids [B] int64.
    """
    if options.temperature == 0:
        return logits.argmax(-1)
    probabilities, ids = ranked_probabilities(logits, options)
    # Rounding can give a noise of exactly 0, which would turn a dropped token's ratio into 0/0.
    noise = torch.empty_like(probabilities).exponential_(generator=generator).clamp_min(torch.finfo(torch.float32).tiny)
    return pick(probabilities, ids, noise)
