"""From the first frames of a clip to a generated video."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from cosmos_mcore.config.derived import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VideoLayout
from cosmos_mcore.inference.generate import generate_tokens
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.tokenizer.base import VideoTokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """A generated clip.

    Attributes:
        video: [3, T, H, W] float32, nominally in [-1, 1]; the given frames in it went through the tokenizer.
        ids: [T', h, w] int64.
        num_given: leading frames of ``video`` that were given.
    """

    video: Tensor
    ids: Tensor
    num_given: int


class VideoPipeline:
    """A model and its tokenizer, ready to continue clips of one size.

    Every tensor-parallel rank has one and calls it alike; ids cross ranks, frames do not.

    Args:
        model: in eval mode, on its device; whole on every tensor-parallel rank.
        tokenizer: the one that the model was trained with.
        layout: of the clips that the model was trained on.
    """

    def __init__(self, model: CosmosARModel, tokenizer: VideoTokenizer, layout: VideoLayout) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.layout = layout
        self.device = next(model.parameters()).device

    def continue_video(self, conditioning: Tensor, options: SamplingOptions, seed: int) -> Continuation:
        """Generates the rest of a clip.

        Args:
            conditioning: [1, 3, T, H, W] float32 in [-1, 1], the first 1 + 8k frames of the clip.
            options: how ids are drawn.
            seed: the same one gives the same video on the same device, whatever was generated before.

        Raises:
            ValueError: if the frames have another size than the model's clips, or leave nothing to generate.
        """
        num_given = self._check(conditioning)
        latent_shape = self.layout.latent_shape
        per_frame = latent_shape[1] * latent_shape[2]
        prompt = torch.empty(1, latents_of(num_given) * per_frame, dtype=torch.int64, device=self.device)
        source = parallel_state.get_tensor_model_parallel_src_rank()
        if dist.get_rank() == source:
            prompt.copy_(self.tokenizer.encode(conditioning.to(self.device)).flatten(1))
        dist.broadcast(prompt, source, group=parallel_state.get_tensor_model_parallel_group())
        started = time.perf_counter()
        new_tokens = self.layout.num_tokens - prompt.size(1)
        generator = torch.Generator(self.device).manual_seed(seed)
        ids = generate_tokens(self.model, prompt, new_tokens, options, generator).unflatten(1, latent_shape)
        seconds = time.perf_counter() - started
        logger.info("generated %d tokens in %.1f s (%.1f tokens/s)", new_tokens, seconds, new_tokens / seconds)
        return Continuation(self.tokenizer.decode(ids)[0], ids[0], num_given)

    def round_trip(self, clip: Tensor) -> Tensor:
        """What the tokenizer alone makes of a clip: [1, 3, T, H, W] in [-1, 1] to the same shape, float32."""
        return self.tokenizer.decode(self.tokenizer.encode(clip.to(self.device)))

    def _check(self, conditioning: Tensor) -> int:
        """Returns how many frames are given."""
        frames, height, width = conditioning.shape[2:]
        latent_frames, *cells = self.layout.latent_shape
        size = tuple(SPATIAL_COMPRESSION * n for n in cells)
        if (height, width) != size:
            raise ValueError(f"the given frames are {height}x{width}, but the model makes clips of {size[0]}x{size[1]}")
        if frames % TEMPORAL_COMPRESSION != 1 or latents_of(frames) >= latent_frames:
            raise ValueError(
                f"{frames} given frames do not fit: the model continues clips of {latent_frames} latent frames from 1 "
                f"or 1 + a multiple of {TEMPORAL_COMPRESSION} frames, fewer than the clip has"
            )
        return frames


def latents_of(frames: int) -> int:
    """Latent frames of the first ``frames`` pixel frames of a chunk."""
    return (frames - 1) // TEMPORAL_COMPRESSION + 1
