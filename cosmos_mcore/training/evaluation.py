"""Forward passes that do not train: the validation's loss, and what the model predicts for a clip."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from cosmos_mcore.data.loader import Batch
from cosmos_mcore.parallel.agreement import largest
from cosmos_mcore.training.setup import Run, eval_iters
from cosmos_mcore.training.step import micro_batches
from cosmos_mcore.training.token_stats import Stats, TokenStats


@torch.no_grad()
def run_forward(run: Run, stats: TokenStats, batch: Batch) -> None:
    """Adds the clips of ``batch`` to ``stats``, on all ranks of the replica; accuracy included."""
    config, model = run.config, run.model
    run.gather_weights()
    size = min(config.training.micro_batch_size, len(batch.ids))
    parts = micro_batches(batch.ids, batch.context, size)
    stats.start_step()
    stats.measure_accuracy = True
    _set_mode(model, training=False)
    try:
        get_forward_backward_func()(
            forward_step_func=lambda iterator, chunk: _forward_step(stats, iterator, chunk),
            data_iterator=[iter(parts) for _ in model] if len(model) > 1 else iter(parts),
            model=list(model) if len(model) > 1 else model[0],
            num_microbatches=len(parts),
            seq_length=stats.layout.padded_sequence_length,
            micro_batch_size=size,
            forward_only=True,
        )
    finally:
        _set_mode(model, training=True)
        stats.measure_accuracy = False


class Validation:
    """The loss on videos that are never trained on: always the same clips.

    Args:
        run: the run, with a loader of such videos.
        stop: whether this rank has been asked to stop.
    """

    def __init__(self, run: Run, stop: Callable[[], bool]) -> None:
        assert run.validation is not None
        self._run, self._stop, self._loader = run, stop, run.validation
        self._stats = TokenStats(run.layout, run.arch, run.config.model.z_loss_coeff, run.device, run.chunks)
        self._iters = eval_iters(run.config, run.validation.num_clips)

    def measure(self) -> Stats | None:
        """Runs all batches, on all ranks together.

        Returns:
            The means over all clips; None if a rank was asked to stop meanwhile.
        """
        for _ in range(self._iters):
            missing = 1
            while missing:
                stop, missing = largest(int(self._stop()), int(not self._loader.ready(0.05)))
                if stop:
                    self._stats.read()
                    return None
            run_forward(self._run, self._stats, self._loader.next())
        return self._stats.read()


def _forward_step(stats: TokenStats, iterator: Iterator[tuple[Tensor, Tensor | None]], model: Any) -> tuple[Any, Any]:
    video, text = next(iterator)
    tokens, labels = stats.batch(video)
    return model(tokens, labels, context=text), stats.reduce


def _set_mode(model: Sequence[DistributedDataParallel], training: bool) -> None:
    for chunk in model:
        chunk.train(training)
