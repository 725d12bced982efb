"""Numbers that follow from the config: computed here, never configured.

Sources: spec/model.md section 1 (latent shape, sequence length) and section 7 (ignored tokens).
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from cosmos_mcore.config.schema import RunConfig

SPATIAL_COMPRESSION = 16
TEMPORAL_COMPRESSION = 8
DEFAULT_PIXEL_CHUNK = 33
FP8_ROWS = 32
TEXT_LENGTH, TEXT_WIDTH = 512, 1024  # of a prompt's embedding: tokens, numbers of each (spec/inference.md section 9)


@dataclass(frozen=True)
class VideoLayout:
    """How one clip lies in the token sequence.

    Attributes:
        pixel_chunk_duration: frames encoded as one causal clip.
        latent_shape: (T, H, W) of the ids of one clip.
        begin_of_video: whether one begin-of-video token stands in front (text-to-video models).
        padded_sequence_length: ``sequence_length`` rounded up to what the parallel layout needs.
        num_ignored_tokens: leading labels without cross entropy: the conditioning latent frames.
    """

    pixel_chunk_duration: int
    latent_shape: tuple[int, int, int]
    begin_of_video: bool
    padded_sequence_length: int
    num_ignored_tokens: int

    @property
    def num_tokens(self) -> int:
        """Video tokens of one clip."""
        return math.prod(self.latent_shape)

    @property
    def sequence_length(self) -> int:
        """Tokens of one sample, begin-of-video token included, padding not."""
        return self.num_tokens + self.begin_of_video

    @property
    def num_loss_positions(self) -> int:
        """Positions of one sample that count in the cross entropy."""
        return self.sequence_length - 1 - self.num_ignored_tokens

    @property
    def num_z_loss_positions(self) -> int:
        """Positions of one sample that count in the z-loss."""
        return self.sequence_length - 1


def pixel_chunk_duration(config: RunConfig) -> int:
    """Frames of one causal clip: as configured, else 33 where it divides ``num_frames``, else all frames."""
    if config.tokenizer.pixel_chunk_duration is not None:
        return config.tokenizer.pixel_chunk_duration
    frames = config.data.num_frames
    return DEFAULT_PIXEL_CHUNK if frames % DEFAULT_PIXEL_CHUNK == 0 else frames


def padding_multiple(config: RunConfig) -> int:
    """The padded sequence length is a multiple of this.

    Context parallelism cuts the sequence in 2 CP slices and sequence parallelism each rank's part in TP; FP8 products
    need a multiple of 32 rows on each rank.
    """
    parallel = config.parallel
    slices = 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1
    if parallel.sequence_parallel:
        slices *= parallel.tensor_model_parallel_size
    return slices * (FP8_ROWS if config.precision.fp8 is not None else 1)


def derive_video_layout(config: RunConfig, begin_of_video: bool = False) -> VideoLayout:
    """Computes the layout of one clip's tokens.

    Raises:
        ValueError: if height, width or frame count do not suit the tokenizer's compression.
    """
    data = config.data
    for name, size in (("height", data.height), ("width", data.width)):
        if size <= 0 or size % SPATIAL_COMPRESSION:
            near = max(SPATIAL_COMPRESSION, round(size / SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION)
            raise ValueError(f"data.{name}={size} must be a multiple of {SPATIAL_COMPRESSION}; try data.{name}={near}")
    chunk = pixel_chunk_duration(config)
    if chunk < 1 or chunk % TEMPORAL_COMPRESSION != 1:
        near = max(1, (chunk - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1)
        key = "data.num_frames" if config.tokenizer.pixel_chunk_duration is None else "tokenizer.pixel_chunk_duration"
        raise ValueError(f"{key}={chunk} must be 1 + a multiple of {TEMPORAL_COMPRESSION}; try {key}={near}")
    if data.num_frames < 1 or data.num_frames % chunk:
        raise ValueError(
            f"data.num_frames={data.num_frames} must be a multiple of the tokenizer's chunk of {chunk} frames"
        )
    latent_t = data.num_frames // chunk * ((chunk - 1) // TEMPORAL_COMPRESSION + 1)
    latent_shape = (latent_t, data.height // SPATIAL_COMPRESSION, data.width // SPATIAL_COMPRESSION)
    given = config.model.num_condition_latents
    if given >= latent_t:
        raise ValueError(
            f"model.num_condition_latents={given} must be less than the {latent_t} latent frames of a clip; give a "
            "smaller number (0 for images) or more frames in data.num_frames"
        )
    length = math.prod(latent_shape) + begin_of_video
    multiple = padding_multiple(config)
    return VideoLayout(
        pixel_chunk_duration=chunk,
        latent_shape=latent_shape,
        begin_of_video=begin_of_video,
        padded_sequence_length=-(-length // multiple) * multiple,
        # One label fewer than the conditioning tokens: label j predicts token j + 1 (spec/model.md section 7).
        num_ignored_tokens=max(0, latent_shape[1] * latent_shape[2] * given - (0 if begin_of_video else 1)),
    )


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Model replicas in a run of ``world_size`` processes (which the layout must divide)."""
    parallel = config.parallel
    return world_size // (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )


def num_microbatches(config: RunConfig, world_size: int) -> int:
    """Micro-batches that each replica runs per optimizer step."""
    return config.training.global_batch_size // (
        config.training.micro_batch_size * data_parallel_size(config, world_size)
    )


def run_dir(config: RunConfig) -> Path:
    """The run's folder: ``${OUTPUT_ROOT:-checkpoints}/PROJECT/GROUP/NAME``."""
    job = config.job
    return _output_root() / job.project / job.group / job.name


def user_path(path: str) -> Path:
    """A path that a key of the config names, ``~`` replaced by the home folder.

    Raises:
        ValueError: if there is no such folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path}: no home folder is known for it; write the path in full") from None


def prompt_cache_dir(config: RunConfig) -> Path:
    """Where the prompts' embeddings lie: ``data.prompt_cache``, one folder for all runs if that is ``auto``."""
    if config.data.prompt_cache == "auto":
        return _output_root() / "prompt_cache"
    return user_path(config.data.prompt_cache)


def _output_root() -> Path:
    return Path(os.environ.get("OUTPUT_ROOT") or "checkpoints")
