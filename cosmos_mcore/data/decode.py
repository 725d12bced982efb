"""Decoders turn clips into frames of the size that training wants; a decoder knows about files, not about ranks."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.images import is_image, read_image
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.mp4 import Mp4File
from cosmos_mcore.data.transforms import resize_and_crop

logger = logging.getLogger(__name__)


class ClipDecoder(ABC):
    """Reads the frames of clips; used from several threads at once.

    Attributes:
        name: of the decoder; part of the token cache's settings, since two decoders differ by a grey level here and
            there, which is enough for other ids.
        parallel_clips: how many clips it decodes at once at its best.
    """

    name: str
    parallel_clips: int

    @abstractmethod
    def decode(self, clip: Clip) -> Tensor:
        """Decodes one clip, scales it until it covers the target size, and cuts out the centre.

        Returns:
            RGB frames [T, 3, height, width], uint8, complete, on the CPU or a GPU.

        Raises:
            UnreadableVideoError: if the file has vanished, the clip is damaged, or decoding takes too long.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends its threads."""


class PyAVDecoder(ClipDecoder):
    """Decodes on the CPU; colours are converted by FFmpeg's scaler, BT.601 unless the file says otherwise."""

    name = "pyav"

    def __init__(self, config: DataConfig) -> None:
        """Takes size, timeout and number of threads from ``config``."""
        self._config = config
        self.parallel_clips = config.num_workers

    def decode(self, clip: Clip) -> Tensor:
        """See ``ClipDecoder.decode``."""
        if is_image(clip.path):
            frames = read_image(clip.path)
        else:
            with Mp4File(clip.path, self._config.decode_timeout) as file:
                frames = file.read(clip.frame_numbers)
        return resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), self._config.height, self._config.width)

    def close(self) -> None:
        """Nothing to end."""


def build_decoder(config: DataConfig, device: torch.device) -> ClipDecoder:
    """Builds the decoder that ``config.decoder`` names; ``auto`` says which it takes, and why.

    Args:
        config: read are ``decoder``, ``height``, ``width``, ``decode_timeout`` and ``num_workers``.
        device: of this rank.

    Raises:
        ValueError: if it is ``dali`` and there is no GPU or no DALI.
    """
    if config.decoder == "pyav":
        return PyAVDecoder(config)
    missing = None if device.type == "cuda" else "there is no GPU"
    if missing is None:
        try:
            from cosmos_mcore.data.dali import DaliDecoder

            decoder: ClipDecoder = DaliDecoder(config, device)
        except ImportError as error:
            missing = f"DALI cannot be imported ({error}); pip install 'cosmos_mcore[gpu]'"
        else:
            logger.info("decoding with DALI on the GPU")
            return decoder
    if config.decoder == "dali":
        raise ValueError(f"data.decoder=dali does not work here: {missing}; or set data.decoder=auto")
    logger.info("decoding with PyAV on the CPU: %s", missing)
    return PyAVDecoder(config)
