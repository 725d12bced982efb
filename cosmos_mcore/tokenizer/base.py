"""The interface of all discrete video tokenizers: frames to ids and back, 16x16 pixels and 8 frames per id."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cosmos_mcore.config.derived import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from cosmos_mcore.tokenizer.fsq import VOCAB_SIZE


class VideoTokenizer(ABC):
    """Splits videos into chunks of ``pixel_chunk_duration`` frames, each encoded as an independent causal clip.

    Latent frame 0 of a chunk stands for pixel frame 0, latent frame j >= 1 for pixel frames 8j-7 to 8j
    (spec/tokenizer.md section 5). By causality, a leading part of one chunk encodes and decodes like the whole.

    Attributes:
        vocab_size: ids are 0..vocab_size-1.
        pixel_chunk_duration: frames of one chunk, 1 + a multiple of 8.
        latent_chunk_duration: latent frames of one chunk.
    """

    vocab_size = VOCAB_SIZE

    def __init__(self, pixel_chunk_duration: int) -> None:
        assert pixel_chunk_duration % TEMPORAL_COMPRESSION == 1, pixel_chunk_duration
        self.pixel_chunk_duration = pixel_chunk_duration
        self.latent_chunk_duration = _latent_frames(pixel_chunk_duration)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Names everything that the ids depend on: method, weights, chunk length."""

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Turns frames into ids.

        Args:
            video: [B, 3, T, H, W], RGB in [-1, 1], any floating dtype. T is a multiple of the chunk length,
                or a leading part of one chunk (1 + 8k frames); H and W are multiples of 16.

        Returns:
            Ids [B, T', H/16, W/16], int32, on the video's device.

        Raises:
            ValueError: if the shape does not suit the tokenizer.
        """
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(f"a video must be [B, 3, T, H, W], got {list(video.shape)}")
        batch, _, frames, height, width = video.shape
        if height % SPATIAL_COMPRESSION or width % SPATIAL_COMPRESSION or not height or not width:
            raise ValueError(
                f"frames of {height}x{width} cannot be encoded: both must be multiples of {SPATIAL_COMPRESSION}"
            )
        chunk = self.pixel_chunk_duration
        if frames < chunk and frames % TEMPORAL_COMPRESSION == 1:
            chunk = frames
        if not frames or frames % chunk:
            raise ValueError(
                f"{frames} frames cannot be encoded: give a multiple of {self.pixel_chunk_duration}, "
                f"or fewer as 1 + a multiple of {TEMPORAL_COMPRESSION}"
            )
        chunks = video.unflatten(2, (frames // chunk, chunk)).transpose(1, 2).flatten(0, 1)
        return self._encode_chunks(chunks).unflatten(0, (batch, frames // chunk)).flatten(1, 2)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """Turns ids into frames.

        Args:
            ids: [B, T', h, w], any integer dtype. T' is a multiple of the latent chunk length,
                or fewer: the leading part of one chunk.

        Returns:
            Video [B, 3, T, 16h, 16w], float32, nominally in [-1, 1], on the device of the ids.

        Raises:
            ValueError: if the shape does not suit the tokenizer.
        """
        if ids.ndim != 4:
            raise ValueError(f"ids must be [B, T, H, W], got {list(ids.shape)}")
        batch, latents = ids.shape[:2]
        chunk = min(self.latent_chunk_duration, latents)
        if not latents or latents % chunk:
            raise ValueError(
                f"{latents} latent frames cannot be decoded: give a multiple of {self.latent_chunk_duration}, or fewer"
            )
        video = self._decode_chunks(ids.unflatten(1, (latents // chunk, chunk)).flatten(0, 1))
        return video.unflatten(0, (batch, latents // chunk)).transpose(1, 2).flatten(2, 3)

    @abstractmethod
    def _encode_chunks(self, video: Tensor) -> Tensor:
        """Encodes independent clips [N, 3, 1+8k, H, W] to ids [N, 1+k, H/16, W/16] int32."""

    @abstractmethod
    def _decode_chunks(self, ids: Tensor) -> Tensor:
        """Decodes independent clips of ids [N, 1+k, h, w] to video [N, 3, 1+8k, 16h, 16w] float32."""


def _latent_frames(pixel_frames: int) -> int:
    return (pixel_frames - 1) // TEMPORAL_COMPRESSION + 1
