"""Pictures of what the model predicts for a training clip, each token from the true ones before it.

After the original's callback (spec/training.md section 6), but for the mean loss, which is the true one here. Training
waits for one forward pass; decoding and drawing happen in a thread.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from PIL import Image
from torch import Tensor

from cosmos_mcore.config.derived import run_dir
from cosmos_mcore.data.encode import replaced_file
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.loader import Batch
from cosmos_mcore.model.sequence import zigzag_positions
from cosmos_mcore.training.evaluation import run_forward
from cosmos_mcore.training.pictures import PictureThread, frames_of
from cosmos_mcore.training.setup import Run
from cosmos_mcore.training.token_stats import TokenStats

logger = logging.getLogger(__name__)

_FOLDER = "video_sampling_teacher_forcing"
_REPLICAS = 8  # that draw
_COLUMNS, _PADDING = 4, 2  # frames of a strip, pixels between them


class TeacherForcing:
    """Draws the first clip of each replica's batch.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._stats = TokenStats(run.layout, run.arch, run.config.model.z_loss_coeff, run.device, run.chunks)
        self._folder = run_dir(run.config) / _FOLDER
        self._replica = parallel_state.get_data_parallel_rank()
        draws = (
            run.chunks[-1].post_process
            and parallel_state.get_tensor_model_parallel_rank() == 0
            and parallel_state.get_context_parallel_rank() == 0
            and self._replica < _REPLICAS
        )
        self._thread = PictureThread("teacher-forcing picture", run.device) if draws else None

    def measure(self, iteration: int, batch: Batch, first_sample: int) -> None:
        """Predicts a clip and starts drawing it. All ranks.

        Args:
            iteration: names the file.
            batch: of this replica's step.
            first_sample: position of the step's first sample in the run's stream.
        """
        run = self._run
        # Megatron's interleaved schedule takes no fewer micro-batches than training's.
        size = len(batch.ids)
        run_forward(run, self._stats, batch.first(size if len(run.model) > 1 else run.config.training.micro_batch_size))
        predicted = self._whole_sequence(self._stats.predictions[0][:1]) if self._stats.predictions else None
        stats = self._stats.read()
        assert stats.token_accuracy is not None
        logger.info(
            "iteration %d teacher-forcing accuracy: %.2f%%, loss: %.4f",
            *(iteration, 100 * stats.token_accuracy, stats.loss),
        )
        if self._thread is None or self._thread.busy or predicted is None:
            return
        clip = run.loader.clip_at(first_sample + self._replica * size)
        ids = batch.ids[0].clone()
        self._thread.start(partial(self._draw, iteration, clip, ids, predicted[0]))

    def close(self) -> None:
        """Finishes the picture under way."""
        if self._thread is not None:
            self._thread.close()

    def _whole_sequence(self, predicted: Tensor) -> Tensor:
        """Predictions [1, S_local] of this rank's slice put together to [1, S]; all context-parallel ranks."""
        group = parallel_state.get_context_parallel_group()
        if group.size() == 1:
            return predicted
        parts = [torch.empty_like(predicted) for _ in range(group.size())]
        dist.all_gather(parts, predicted.contiguous(), group=group)
        whole = predicted.new_empty((1, self._run.layout.padded_sequence_length))
        for rank, part in enumerate(parts):
            positions = zigzag_positions(self._run.layout.padded_sequence_length, rank, group.size())
            whole[:, positions.to(whole.device)] = part
        return whole

    @torch.no_grad()
    def _draw(self, iteration: int, clip: Clip, ids: Tensor, predicted: Tensor) -> None:
        run, layout = self._run, self._run.layout
        video = frames_of(run.loader, clip)
        # Position j predicts token j + 1; the first token is given.
        first = 0 if layout.begin_of_video else 1
        predicted = torch.cat((ids[:first], predicted[: layout.num_tokens - first]))
        shape = (1, *layout.latent_shape)
        strips = [run.tokenizer.decode(one.view(shape))[0] for one in (ids, predicted)]
        if video is not None:
            strips.insert(0, video)
            changed = (run.tokenizer.encode(video[None]).flatten() != ids).float().mean().item()
            if changed:
                logger.info("iteration %d: read again, %.2f%% of the tokens are others", iteration, 100 * changed)
        picture = torch.cat([strip(one.float().cpu()) for one in strips], dim=1)
        name = f"vid_teacher_forcing_iter_{iteration:09d}_{dist.get_rank():04d}.jpg"
        with replaced_file(self._folder / name) as temporary:
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary, format="JPEG", quality=95)


def strip(video: Tensor) -> Tensor:
    """Every k-th frame at half size in a row.

    Args:
        video: [3, T, H, W] in [-1, 1].

    Returns:
        [3, H', W'] uint8.
    """
    frames = video[:, :: -(-video.size(1) // _COLUMNS)].transpose(0, 1)
    small = F.interpolate(frames, scale_factor=0.5, mode="bilinear", antialias=True)
    padded = F.pad((small + 1) / 2, (_PADDING, 0, _PADDING, _PADDING))
    row = F.pad(torch.cat(list(padded), dim=2), (0, _PADDING, 0, 0))
    return (row.clamp(0, 1) * 255).round().to(torch.uint8)
