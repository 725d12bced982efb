"""What else a forward pass tells besides the loss: loss per latent frame and per clip, token accuracy.

``TokenStats`` takes the place of ``LossPositions`` in a step and adds up on the device; nothing waits until it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.loss import TokenLosses
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.training.step import LossPositions


@dataclass
class Stats:
    """Over the positions that count in the cross entropy, of all clips since the last reading.

    Attributes:
        loss: mean cross entropy.
        frame_losses: mean cross entropy of each latent frame that is learnt, the first one learnt first.
        token_accuracy: part of the tokens whose most likely prediction is right; None where it was not measured.
    """

    loss: float
    frame_losses: list[float]
    token_accuracy: float | None


class PendingStats:
    """Numbers on their way from the device; whoever reads them later waits for nothing."""

    def __init__(self, sums: Tensor, first_learnt: int) -> None:
        """Starts the copy of ``sums``: losses and counts of each frame, right and counted tokens."""
        self._sums, self._first_learnt = sums, first_learnt
        self._event: torch.cuda.Event | None = None
        if sums.is_cuda:
            self._sums = torch.empty(sums.shape, pin_memory=True).copy_(sums, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Stats:
        """Waits for the numbers."""
        if self._event is not None:
            self._event.synchronize()
        *frames, right, total = self._sums.tolist()
        losses, counts = frames[: len(frames) // 2], frames[len(frames) // 2 :]
        means = [loss / count if count else 0.0 for loss, count in zip(losses, counts, strict=True)]
        loss = sum(losses) / max(sum(counts), 1.0)
        return Stats(loss, means[self._first_learnt :], right / total if total else None)


class TokenStats(LossPositions):
    """``LossPositions`` that remember.

    Args:
        layout: how a clip lies in the sequence.
        arch: the model's sizes.
        z_loss_coeff: weight of the z-loss.
        device: where the sums live.
        chunks: this rank's model chunks; the last stage's logits give the accuracy. None: no accuracy.
    """

    def __init__(
        self,
        layout: VideoLayout,
        arch: ModelArch,
        z_loss_coeff: float,
        device: torch.device,
        chunks: Sequence[CosmosARModel] | None = None,
    ) -> None:
        super().__init__(layout, arch, z_loss_coeff, device)
        latents, *grid = layout.latent_shape
        per_frame = grid[0] * grid[1]
        positions = torch.arange(layout.padded_sequence_length)
        if self.slice is not None:
            positions = positions[self.slice.cpu()]
        # Position j predicts token j + 1, which belongs to this frame:
        frames = ((positions + 1 - int(layout.begin_of_video)) // per_frame).clamp(0, latents - 1)
        self._frames = frames.to(device)
        self._latents = latents
        self._first_learnt = (layout.num_ignored_tokens + 1) // per_frame
        self._sums = torch.zeros(2 * latents + 2, device=device)  # losses, counts; right tokens, counted tokens
        self.measure_accuracy = False
        self._labels: Tensor | None = None
        self._predicted: Tensor | None = None
        # Of each micro-batch of the step under way, on the last stage: [B] losses, and [B, S_local] ids if measured.
        self.clip_losses: list[Tensor] = []
        self.predictions: list[Tensor] = []
        if chunks is not None and chunks[-1].post_process:
            chunks[-1].output_layer.register_forward_hook(self._on_logits)

    def start_step(self) -> None:
        """Forgets the clips of the step before."""
        self.clip_losses, self.predictions = [], []

    def batch(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """See ``LossPositions``."""
        inputs, labels = super().batch(tokens)
        self._labels = labels
        return inputs, labels

    def reduce(self, losses: TokenLosses) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``LossPositions``."""
        ce, counts = losses.cross_entropy.detach(), self.in_ce.to(torch.float32)
        kept = torch.where(self.in_ce, ce, 0.0)
        self.clip_losses.append(kept.sum(dim=1))
        self._sums[: self._latents].index_add_(0, self._frames, kept.sum(dim=0))
        self._sums[self._latents : -2].index_add_(0, self._frames, counts * len(ce))
        if self._predicted is not None and self._labels is not None:
            self.predictions.append(self._predicted)
            right = (self._predicted == self._labels) & self.in_ce
            self._sums[-2] += right.sum()
            self._sums[-1] += counts.sum() * len(ce)
            self._predicted = None
        return super().reduce(losses)

    def start_reading(self) -> PendingStats:
        """Adds up over all ranks, on the device, and starts again. All ranks."""
        sums = self._sums.clone()
        self._sums.zero_()
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        _from_last_stage(sums)
        return PendingStats(sums, self._first_learnt)

    def read(self) -> Stats:
        """Adds up over all ranks and starts again. All ranks; waits for the device."""
        return self.start_reading().read()

    def _on_logits(self, module: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
        """Most likely ids of the micro-batch, before anything overwrites the logits."""
        if self.measure_accuracy:
            self._predicted = most_likely(output[0].detach()).transpose(0, 1)


def most_likely(logits: Tensor) -> Tensor:
    """Ids [S, B] int64 of the largest logits, of this rank's part [S, B, V / TP]; the same on all ranks of a group."""
    group = parallel_state.get_tensor_model_parallel_group()
    values, ids = logits.max(dim=-1)
    if group.size() == 1:
        return ids
    mine = torch.stack((values.double(), (ids + group.rank() * logits.size(-1)).double()))
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    stacked = torch.stack(parts)  # [TP, 2, S, B]
    best = stacked[:, 0].argmax(dim=0, keepdim=True)
    return stacked[:, 1].gather(0, best)[0].long()


def _from_last_stage(values: Tensor) -> None:
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            values,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
