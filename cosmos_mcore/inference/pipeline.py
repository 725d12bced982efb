"""From the first frames of clips to generated videos."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cosmos_mcore.config.derived import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, VideoLayout
from cosmos_mcore.inference.diffusion.decoder import DiffusionDecoder
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.offload import Parking
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.tokenizer.base import VideoTokenizer

logger = logging.getLogger(__name__)

_NEXT_CLIP = 2**32  # what a seed grows by from one clip of a video to the next: users' seeds are smaller


@dataclass(frozen=True)
class Continuation:
    """A generated video.

    Attributes:
        video: [3, T, H, W] float32, nominally in [-1, 1]; the given frames in it are decoded from ids, too.
        ids: of each clip that the video was made of, [T', h, w] int64.
        num_given: leading frames of ``video`` that were given.
    """

    video: Tensor
    ids: tuple[Tensor, ...]
    num_given: int


class VideoPipeline:
    """A model and what turns frames into its ids and back, ready to continue clips of one size.

    Every tensor-parallel rank has one and calls it alike. Ids cross ranks, frames do not: only the first rank encodes
    and, with the tokenizer, decodes. A diffusion decoder is shared by all.

    Args:
        network: the model.
        make_tokenizer: makes the tokenizer that the model was trained with; called on the first rank only.
        offload_network: park the model in CPU memory while it does not generate.
        offload_tokenizer: make the tokenizer for each use, and drop it afterwards.
        decoder: makes the frames, of the network's ranks together; None: the tokenizer does.
    """

    def __init__(
        self,
        network: CachedNetwork,
        make_tokenizer: Callable[[], VideoTokenizer],
        offload_network: bool = False,
        offload_tokenizer: bool = False,
        decoder: DiffusionDecoder | None = None,
    ) -> None:
        self.network, self.layout, self.device = network, network.layout, network.device
        self.is_first = network.group.rank() == 0
        self._parking = Parking(network.weights) if offload_network else None
        self._make_tokenizer = make_tokenizer
        self._keeps_tokenizer = not offload_tokenizer
        self._tokenizer = make_tokenizer() if self.is_first and self._keeps_tokenizer else None
        self._decoder = decoder
        self._generator: TokenGenerator | None = None

    @property
    def clip_frames(self) -> int:
        """Frames of one clip, as the model has learnt it."""
        return self._frames_of(self.layout.latent_shape[0])

    def continue_videos(
        self,
        given: Tensor,
        options: SamplingOptions,
        seeds: Sequence[int],
        num_frames: int | None = None,
        text: Tensor | None = None,
        on_frames: Callable[[Tensor], None] | None = None,
    ) -> list[Continuation]:
        """Generates the rest of several videos at once.

        A video longer than the model's clips is a chain of them: each next one is given the last frames of the one
        before, as they are in the result, as many as the first was given, and they are dropped from its own frames.

        Args:
            given: [B, 3, T, H, W] float32 in [-1, 1], the first 1 + 8k frames of each video.
            options: how ids are drawn.
            seeds: one per video: the same one gives the same video on the same kind of device, whatever is generated
                beside or before it.
            num_frames: of each video; None: of one clip.
            text: [B, M, context size], the embedding of each video's prompt, for models that read text; any device.
            on_frames: told, on the first rank, the frames of the videos so far [B, 3, T, H, W], first those given, then
                whenever a latent frame is complete; by the tokenizer, also where a decoder makes better ones in the
                end. An error that it raises ends the generation.

        Returns:
            The videos on the first rank; nothing on the others.

        Raises:
            ValueError: if the frames have another size than the model's clips, or leave nothing to generate, or if
                there is a text for a model that reads none, or none for one that does.
        """
        num_given = check_given(self.layout, given.shape[2:], num_frames)
        wanted = self.clip_frames if num_frames is None else num_frames
        videos: list[Tensor] = []
        ids: list[Tensor] = []
        length, clip = 0, 0
        while length < wanted:
            drop = num_given if clip else 0
            show = None
            if on_frames is not None and self.is_first:
                show = partial(self._show, on_frames, tuple(videos), drop, wanted)
            clip_seeds = [seed + clip * _NEXT_CLIP for seed in seeds]
            new = self._generate(given, options, clip_seeds, wanted - length, clip, text, show)
            if show is not None and self._decoder is not None:  # which takes its time
                show(new.flatten(1))
            length += self._frames_of(new.size(1)) - drop
            video = self._decode(new, clip_seeds, text)
            if self.is_first:
                videos.append(video[:, :, drop:])
                ids.append(new)
                if on_frames is not None and length < wanted:
                    on_frames(torch.cat(videos, dim=2))
                given = video[:, :, -num_given:].clamp(-1, 1)
            clip += 1
        if not self.is_first:
            return []
        whole = torch.cat(videos, dim=2)[:, :, :wanted]
        return [Continuation(whole[i], tuple(new[i] for new in ids), num_given) for i in range(len(whole))]

    def _show(
        self, on_frames: Callable[[Tensor], None], before: tuple[Tensor, ...], drop: int, wanted: int, ids: Tensor
    ) -> None:
        """Tells the frames so far: those of the clips before, and those of the ids [B, n] of this one."""
        latents = ids.unflatten(1, (-1, *self.layout.latent_shape[1:]))
        chunks = latents.split(latents_of(self.layout.pixel_chunk_duration), dim=1)
        new = torch.cat([self._with_tokenizer(partial(VideoTokenizer.decode, ids=chunk)) for chunk in chunks], dim=2)
        on_frames(torch.cat((*before, new[:, :, drop:].cpu()), dim=2)[:, :, :wanted])

    def round_trip(self, clip: Tensor, seed: int = 0, text: Tensor | None = None) -> Tensor:
        """What becomes of a video whose ids are all right: encoded and decoded.

        Args:
            clip: [1, 3, T, H, W] float32 in [-1, 1].
            seed: of the diffusion decoder.
            text: [1, M, context size], for the diffusion decoder.

        Returns:
            Of the shape of ``clip``, float32 on the CPU; nothing ([0]) on other ranks than the first.
        """
        _, _, frames, height, width = clip.shape
        latents = sum(latents_of(len(chunk)) for chunk in torch.arange(frames).split(self.layout.pixel_chunk_duration))
        cells = (height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
        return self._decode(self._encode(clip, (latents, *cells)), [seed], text)

    def _encode(self, video: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Frames [B, 3, T, H, W], of which the first rank's count, to ids [B, *shape] int64 on all ranks."""
        ids = torch.empty(len(video), *shape, dtype=torch.int64, device=self.device)
        if self.is_first:
            pixels = video.to(self.device)
            ids.copy_(self._with_tokenizer(lambda tokenizer: tokenizer.encode(pixels)))
        group = self.network.group
        if group.size() > 1:
            dist.broadcast(ids, dist.get_global_rank(group, 0), group=group)
        return ids

    def _decode(self, ids: Tensor, seeds: Sequence[int], text: Tensor | None) -> Tensor:
        """Ids [B, T', h, w] to frames [B, 3, T, H, W] float32 on the CPU; nothing ([0]) on other ranks than the first.

        Each causal clip of a video is drawn from the noise of the video's seed.
        """
        decoder = self._decoder
        if decoder is None:
            if not self.is_first:
                return torch.empty(0)
            return self._with_tokenizer(lambda tokenizer: tokenizer.decode(ids)).cpu()
        started = time.perf_counter()
        videos = []
        for row, seed in enumerate(seeds):
            told = None if text is None else text[row : row + 1]
            chunks = ids[row].split(latents_of(self.layout.pixel_chunk_duration))
            parts = [decoder.decode(chunk, told, seed) for chunk in chunks]
            if self.is_first:
                videos.append(torch.cat([part.cpu() for part in parts], dim=1))
            del parts
        if not self.is_first:
            return torch.empty(0)
        frames, seconds = len(videos) * videos[0].size(1), time.perf_counter() - started
        logger.info("decoded %d frames in %.1f s (diffusion decoder)", frames, seconds)
        return torch.stack(videos)

    def _generate(
        self,
        given: Tensor,
        options: SamplingOptions,
        seeds: list[int],
        missing: int,
        clip: int,
        text: Tensor | None,
        show: Callable[[Tensor], None] | None,
    ) -> Tensor:
        """Ids [B, T', h, w] of one clip that begins with ``given``, of no more latent frames than ``missing`` needs."""
        batch, _, num_given, _, _ = given.shape
        latent_frames, *cells = self.layout.latent_shape
        if latents_of(self.layout.pixel_chunk_duration) == latent_frames:  # else only whole chunks can be decoded
            frames = missing + (num_given if clip else 0)
            latent_frames = min(latent_frames, latents_of(frames + TEMPORAL_COMPRESSION - 1))
        per_frame = cells[0] * cells[1]
        prompt = self._encode(given, (latents_of(num_given), *cells)).flatten(1)
        if show is not None and not clip:
            show(prompt)
        new_tokens = latent_frames * per_frame - prompt.size(1)
        first = int(self.layout.begin_of_video)
        # The first id after the video tokens says that a video begins (spec/model.md section 5).
        prompt = F.pad(prompt, (first, 0), value=self.network.arch.vocab_size)
        text_length = 0 if text is None else text.size(1)
        with self._parking.present() if self._parking is not None else nullcontext():
            wanted = (batch, options, text_length)
            if self._generator is not None and self._generator.made_for != wanted:
                self._generator = None  # its cache goes before the next one comes
            if self._generator is None:
                self._generator = TokenGenerator(self.network, *wanted)
            started = time.perf_counter()
            try:
                ids = self._generator(prompt, new_tokens, seeds, text, show)
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            finally:
                if self._parking is not None:
                    self._generator = None
            total, seconds = new_tokens * batch, time.perf_counter() - started
        logger.info("generated %d tokens in %.1f s (%.1f tokens/s)", total, seconds, total / seconds)
        return ids[:, first:].unflatten(1, (latent_frames, *cells))

    def _with_tokenizer(self, use: Callable[[VideoTokenizer], Tensor]) -> Tensor:
        tokenizer = self._tokenizer or self._make_tokenizer()
        result = use(tokenizer)
        if not self._keeps_tokenizer and self.device.type == "cuda":
            del tokenizer
            torch.cuda.empty_cache()
        return result

    def _frames_of(self, latents: int) -> int:
        """Pixel frames that so many latent frames stand for."""
        return pixel_frames(latents, self.layout.pixel_chunk_duration)


def check_given(layout: VideoLayout, shape: Sequence[int], num_frames: int | None = None) -> int:
    """Checks that a model of clips of ``layout`` can continue frames of ``shape`` (T, H, W), and returns T.

    Raises:
        ValueError: if not; also if they are not fewer than ``num_frames``.
    """
    frames, height, width = shape
    latent_frames, *cells = layout.latent_shape
    size = tuple(SPATIAL_COMPRESSION * n for n in cells)
    if (height, width) != size:
        raise ValueError(f"the given frames are {height}x{width}, but the model makes clips of {size[0]}x{size[1]}")
    if frames % TEMPORAL_COMPRESSION != 1 or latents_of(frames) >= latent_frames:
        raise ValueError(
            f"{frames} given frames do not fit: the model continues clips of {latent_frames} latent frames from 1 "
            f"or 1 + a multiple of {TEMPORAL_COMPRESSION} frames, fewer than the clip has"
        )
    if num_frames is not None and num_frames <= frames:
        raise ValueError(f"a video of {num_frames} frames leaves nothing to generate after {frames} given ones")
    return frames


def pixel_frames(latents: int, chunk: int) -> int:
    """Pixel frames of the first ``latents`` latent frames of a video in chunks of ``chunk`` pixel frames."""
    chunks, rest = divmod(latents, latents_of(chunk))
    return chunks * chunk + (1 + TEMPORAL_COMPRESSION * (rest - 1) if rest else 0)


def latents_of(frames: int) -> int:
    """Latent frames of the first ``frames`` pixel frames of a chunk."""
    return (frames - 1) // TEMPORAL_COMPRESSION + 1
