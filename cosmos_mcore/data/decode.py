"""Decoders turn clips into frames; a decoder knows about files and nothing about ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.mp4 import Mp4File


class ClipDecoder(ABC):
    """Reads the frames of clips; used from several threads at once."""

    @abstractmethod
    def decode(self, clip: Clip) -> Tensor:
        """Decodes one clip.

        Returns:
            RGB frames [T, 3, H, W], uint8, in the size of the file.

        Raises:
            UnreadableVideoError: if the file has vanished or the clip is damaged.
        """


class PyAVDecoder(ClipDecoder):
    """Decodes on the CPU."""

    def decode(self, clip: Clip) -> Tensor:
        """See ``ClipDecoder.decode``."""
        with Mp4File(clip.path) as file:
            frames = file.read(clip.frame_numbers)
        return torch.from_numpy(frames).permute(0, 3, 1, 2)


def build_decoder(config: DataConfig) -> ClipDecoder:
    """Builds the decoder that ``config.decoder`` names.

    Raises:
        ValueError: if the name is unknown.
    """
    if config.decoder in ("auto", "pyav"):
        return PyAVDecoder()
    raise ValueError(f"data.decoder={config.decoder} is unknown; known are auto and pyav")
