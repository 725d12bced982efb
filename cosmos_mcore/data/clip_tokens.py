"""From one clip to its ids: from the token cache, or decoded and tokenized."""

from __future__ import annotations

import ctypes
import itertools
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout, derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.decode import ClipDecoder, build_decoder
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.mp4 import UnreadableVideoError
from cosmos_mcore.data.shards import ClipKey
from cosmos_mcore.data.token_cache import TokenCache, cache_folder, cache_settings, is_cache
from cosmos_mcore.data.transforms import normalize
from cosmos_mcore.tokenizer.base import VideoTokenizer

_TRIM_INTERVAL = 256  # clips


class ClipTokens:
    """Gives the ids of clips; thread-safe, and best asked from ``parallel_clips`` threads.

    The cache changes how fast they come, never which: a file that has vanished or changed is not served from it.
    """

    def __init__(
        self,
        decoder: ClipDecoder,
        tokenizer: VideoTokenizer,
        layout: VideoLayout,
        device: torch.device,
        cache: TokenCache | None,
    ) -> None:
        """Takes the parts.

        Args:
            decoder: makes frames of the right size.
            tokenizer: makes ids; on ``device``.
            layout: shape of one clip's ids.
            device: where the tokenizer runs.
            cache: asked first, and told; None: there is none.
        """
        self.cache, self.parallel_clips = cache, decoder.parallel_clips
        self._decoder, self._tokenizer, self._layout, self._device = decoder, tokenizer, layout, device
        self._made = itertools.count(1)
        # Not training's stream: a step must not queue behind a clip of a later one.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def ids(self, clip: Clip) -> np.ndarray:
        """Ids [tokens of a clip], uint16.

        Raises:
            UnreadableVideoError: if the file has vanished or the clip is damaged.
        """
        if self.cache is None:
            return self._make(clip)
        content = clip.content or self.cache.contents.of(clip.path)
        key = ClipKey(content, clip.first_frame)
        ids = self.cache.find(key)
        if ids is None:
            if clip.content is not None:
                raise UnreadableVideoError(f"frames from {clip.first_frame} on are no longer in the token cache")
            ids = self._make(clip)
            self.cache.add(key, ids)
        return ids

    def video(self, clip: Clip) -> Tensor:
        """Frames [3, T, H, W] float32 in [-1, 1] on the device, as the tokenizer gets them.

        Raises:
            UnreadableVideoError: if the clip cannot be decoded, or only its ids are kept.
        """
        if clip.content is not None:
            raise UnreadableVideoError("only its ids are kept")
        return normalize(self._frames(clip))

    def close(self) -> None:
        """Ends the decoder and closes the cache's files."""
        self._decoder.close()
        if self.cache is not None:
            self.cache.close()

    def _make(self, clip: Clip) -> np.ndarray:
        if next(self._made) % _TRIM_INTERVAL == 0:
            _release_memory()
        with self._on_stream():
            ids: Tensor = self._tokenizer.encode(normalize(self._frames(clip)).unsqueeze(0)).squeeze(0)
            assert tuple(ids.shape) == self._layout.latent_shape, (ids.shape, self._layout.latent_shape)
            return ids.flatten().cpu().numpy().astype(np.uint16)  # this thread waits for the GPU; training does not

    def _frames(self, clip: Clip) -> Tensor:
        """Frames [T, 3, H, W] uint8 on the device, for this thread's stream."""
        frames = self._decoder.decode(clip).to(self._device)
        if frames.is_cuda:
            # GPU decoders make them on a stream of their own, and would use the memory again at once.
            frames.record_stream(torch.cuda.current_stream(self._device))
        return frames

    def _on_stream(self) -> Any:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def build_clip_tokens(config: RunConfig, tokenizer: VideoTokenizer, device: torch.device) -> ClipTokens:
    """Builds decoder and cache of a run.

    Args:
        config: the run's.
        tokenizer: on ``device``.
        device: of this rank.

    Raises:
        ValueError: if the decoder is not available, or the cache was made with other settings.
    """
    layout = derive_video_layout(config)
    decoder = build_decoder(config.data, device)
    settings = cache_settings(config, layout, tokenizer.fingerprint, decoder.name)
    folder = cache_folder(config, settings)
    limit = config.data.token_cache_gb * 1e9
    cache = None if folder is None else TokenCache(folder, settings, limit, writable=not is_cache(config.data.path))
    return ClipTokens(decoder, tokenizer, layout, device, cache)


def _release_memory() -> None:
    """Gives back what glibc holds for frames that are gone: with many threads, it would grow for thousands of clips."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
