"""One optimizer step: batch, pipeline schedule, loss, gradients, update."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.model.loss import TokenLosses
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.model.sequence import zigzag_positions
from cosmos_mcore.training.gradients import zero_gradients
from cosmos_mcore.training.optimizer import update


class LossPositions:
    """Which positions of this rank's slice of the sequence count in the losses (spec/model.md section 7).

    Position j predicts token j + 1. Cross entropy leaves out the conditioning frames; the z-loss counts every position
    that has a next token; padding counts in neither.
    """

    def __init__(self, layout: VideoLayout, arch: ModelArch, z_loss_coeff: float, device: torch.device) -> None:
        self.layout, self.z_loss_coeff = layout, z_loss_coeff
        self.begin_of_video_id = arch.vocab_size  # the first id after the video tokens (spec/model.md section 5)
        positions = torch.arange(layout.padded_sequence_length)
        size = parallel_state.get_context_parallel_world_size()
        self.slice: Tensor | None = None
        if size > 1:
            rank = parallel_state.get_context_parallel_rank()
            positions = zigzag_positions(layout.padded_sequence_length, rank, size)
            self.slice = positions.to(device)
        predicts = positions < layout.sequence_length - 1
        self.in_ce = (predicts & (positions >= layout.num_ignored_tokens)).to(device)
        self.in_z = predicts.to(device)

    def batch(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Takes video ids [B, tokens of a clip] and returns this rank's (inputs, labels), [B, S_local] each."""
        layout = self.layout
        padded = tokens.new_zeros(len(tokens), layout.padded_sequence_length + 1)
        if layout.begin_of_video:
            padded[:, 0] = self.begin_of_video_id
        padded[:, int(layout.begin_of_video) : layout.sequence_length] = tokens
        inputs, labels = padded[:, :-1], padded[:, 1:]
        if self.slice is not None:
            inputs, labels = inputs[:, self.slice], labels[:, self.slice]
        return inputs.contiguous(), labels.contiguous()

    def reduce(self, losses: TokenLosses) -> tuple[Tensor, dict[str, Tensor]]:
        """Sums [B, S_local] losses to this rank's share of the micro-batch mean.

        The counts are those of the whole sequence, so the shares of the context-parallel ranks add up to the mean.
        """
        batch = len(losses.cross_entropy)
        layout = self.layout
        ce = (losses.cross_entropy * self.in_ce).sum() / (batch * layout.num_loss_positions)
        z = (losses.log_sum_exp.square() * self.in_z).sum() / (batch * layout.num_z_loss_positions)
        z = self.z_loss_coeff * z
        return ce + z, {"losses": torch.stack((ce, z)).detach()}


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        loss: mean cross entropy over the global batch.
        z_loss: mean z-loss, coefficient included.
        grad_norm: norm of the whole model's gradient before clipping.
    """

    loss: float
    z_loss: float
    grad_norm: float

    @property
    def updated(self) -> bool:
        """Whether the weights have changed: a gradient that is not finite leaves them alone."""
        return math.isfinite(self.grad_norm)


class PendingResult:
    """A step's numbers on their way from the device; whoever reads them one step later waits for nothing."""

    def __init__(self, numbers: Tensor) -> None:
        """Starts the copy of ``numbers``: loss, z-loss and grad norm, float32 [3]."""
        self._event: torch.cuda.Event | None = None
        self._numbers = numbers
        if numbers.is_cuda:
            self._numbers = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> StepResult:
        """Waits for the numbers."""
        if self._event is not None:
            self._event.synchronize()
        return StepResult(*self._numbers.tolist())


def train_step(
    model: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    positions: LossPositions,
    tokens: Tensor,
    micro_batch_size: int,
    context: Tensor | None = None,
) -> PendingResult:
    """Runs forward, backward and update over this replica's part of the global batch.

    Args:
        model: this rank's chunks.
        optimizer: its optimizer, learning rate set.
        positions: the loss positions of this rank.
        tokens: [num_microbatches * micro_batch_size, tokens of a clip] int64, the same on all ranks of the replica.
        micro_batch_size: clips per micro-batch.
        context: text embeddings [clips, text length, context size] of a text-to-video model, likewise.
    """
    losses = forward_backward(model, positions, tokens, micro_batch_size, context)
    return PendingResult(torch.cat((losses, update(optimizer))))


def forward_backward(
    model: Sequence[DistributedDataParallel],
    positions: LossPositions,
    tokens: Tensor,
    micro_batch_size: int,
    context: Tensor | None = None,
) -> Tensor:
    """The part of ``train_step`` that leaves the reduced gradients behind.

    Returns:
        Float32 [2] on the device: mean cross entropy and mean z-loss over the global batch, on every rank.
    """
    parts = micro_batches(tokens, context, micro_batch_size)
    zero_gradients(model)
    iterators = [iter(parts) for _ in model]
    reduced = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, positions),
        data_iterator=iterators if len(model) > 1 else iterators[0],
        model=list(model) if len(model) > 1 else model[0],
        num_microbatches=len(parts),
        seq_length=positions.layout.padded_sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=False,
    )
    return _mean_losses(reduced, tokens.device)


def micro_batches(tokens: Tensor, context: Tensor | None, size: int) -> list[tuple[Tensor, Tensor | None]]:
    """Cuts ids [B, tokens of a clip] and texts [B, text length, width] into parts of ``size`` clips.

    Returns:
        Ids [size, tokens of a clip] and, as the model takes them, texts [text length, size, width] of each part.
    """
    parts = tokens.split(size)
    if context is None:
        return [(part, None) for part in parts]
    texts = (text.transpose(0, 1).contiguous() for text in context.split(size))
    return list(zip(parts, texts, strict=True))


def _forward_step(
    positions: LossPositions, iterator: Iterator[tuple[Tensor, Tensor | None]], model: Any
) -> tuple[Any, Any]:
    video, text = next(iterator)
    tokens, labels = positions.batch(video)
    return model(tokens, labels, context=text), positions.reduce


def _mean_losses(reduced: list[dict[str, Tensor]], device: torch.device) -> Tensor:
    """[2] means over the global batch, on every rank; only the last pipeline stage has any."""
    if reduced:
        mean = torch.stack([item["losses"] for item in reduced]).mean(dim=0)
        dist.all_reduce(mean, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        mean /= parallel_state.get_data_parallel_world_size()
    else:
        mean = torch.zeros(2, device=device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        dist.broadcast(
            mean,
            parallel_state.get_pipeline_model_parallel_last_rank(),
            group=parallel_state.get_pipeline_model_parallel_group(),
        )
    return mean
