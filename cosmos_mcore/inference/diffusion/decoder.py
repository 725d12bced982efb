"""The diffusion decoder as a whole: ids to frames, sharper than the tokenizer's own decoder makes them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_mcore.config.derived import TEMPORAL_COMPRESSION
from cosmos_mcore.inference.diffusion.network import LATENT_CHANNELS, PATCH, DiffusionNetwork
from cosmos_mcore.inference.diffusion.sampler import SIGMA_DATA, noise_generator, noise_levels, sample
from cosmos_mcore.inference.diffusion.weights import TOKENIZER_FOLDER, check_files, read_network, read_text
from cosmos_mcore.inference.offload import Parking
from cosmos_mcore.tokenizer.cv8x8x8 import CHUNK, ContinuousDecoder

OVERLAP = 2  # latent frames that a chunk shares with the one before it
_FADE = TEMPORAL_COMPRESSION * (OVERLAP - 1) + 1  # frames in which one chunk goes over into the next


class DiffusionDecoder:
    """Network, continuous tokenizer and the text for those who give none.

    bfloat16 on GPUs, float32 elsewhere; the latent between the steps is float32 everywhere.

    Args:
        network: in eval mode, with weights, on the device.
        tokenizer: on the device.
        text_embedding: [1, M, 1024].
        device: where all is computed.
        offload: park the network in CPU memory while ``decode`` does not run.
    """

    def __init__(
        self,
        network: DiffusionNetwork,
        tokenizer: ContinuousDecoder,
        text_embedding: Tensor,
        device: torch.device,
        *,
        offload: bool = False,
    ) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.text_embedding = text_embedding
        self.device = device
        self._parking = Parking((*network.parameters(), *network.buffers())) if offload else None

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        *,
        fp8: bool = False,
        offload: bool = False,
    ) -> DiffusionDecoder:
        """Loads the released files.

        Args:
            folder: of released models, with one folder for the network and one for the continuous tokenizer.
            device: where all is computed.
            group: 1, 2, 4 or 8 ranks that share the work; all of them decode together and get all frames.
            fp8: round the large matrices and what they are multiplied with to 8 bits.
            offload: park the network in CPU memory while ``decode`` does not run.

        Raises:
            ValueError: if a file is missing or damaged, or the ranks cannot share the work.
        """
        check_files(folder)
        if group is not None and group.size() == 1:
            group = None
        if group is not None:
            check_processes(group.size())
        size, weights = read_network(folder)
        with torch.device("meta"):
            network = DiffusionNetwork(size, group).requires_grad_(False).eval()
        network.load_state_dict(weights, assign=True)
        tokenizer = ContinuousDecoder.from_folder(folder / TOKENIZER_FOLDER, device)
        text = read_text(folder)
        network.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        if fp8:
            network.to_fp8()
        return cls(network, tokenizer, text, device, offload=offload)

    @torch.no_grad()
    def decode(self, ids: Tensor, text_embedding: Tensor | None = None, seed: int = 0) -> Tensor:
        """Makes frames of the ids of one causal clip.

        Up to 8 latent frames are one chunk, and fewer are filled up by reflection in time. Longer clips are made in
        chunks of 8 that share at least 2, each fading into the next during the last 9 frames of the earlier one.

        Args:
            ids: [T, h, w], any integer dtype, any device; the same on all ranks.
            text_embedding: [1, M, 1024] of T5; None: that of the fixed prompt of the release.
            seed: of the noise; for one chunk the same noise as the original's.

        Returns:
            [3, 8 (T - 1) + 1, 16h, 16w] float32 in [-1, 1] on the device.

        Raises:
            ValueError: if ids or text do not suit the network.
        """
        text = self._check(ids, self.text_embedding if text_embedding is None else text_embedding)
        ids = ids.to(self.device, torch.int64)
        generator = noise_generator(seed)
        shape = (1, LATENT_CHANNELS, CHUNK, PATCH * ids.size(1), PATCH * ids.size(2))
        with self._parking.present() if self._parking is not None else nullcontext():
            latents: list[Tensor] = []
            starts = chunk_starts(len(ids))
            noise = torch.empty(0)
            for number, start in enumerate(starts):
                fresh = torch.randn(shape, generator=generator)
                if number:  # the same noise for the same latent frame, so that both chunks make alike pictures of it
                    step = start - starts[number - 1]
                    fresh[:, :, : CHUNK - step] = noise[:, :, step:]
                noise = fresh
                chunk = ids[start : start + CHUNK]
                filled = chunk[reflected(len(chunk), CHUNK)]
                latents.append(self._denoise(filled, text, noise)[:, :, : len(chunk)] / SIGMA_DATA)
        video = torch.empty(3, 0, 0, 0)
        for start, latent in zip(starts, latents, strict=True):
            frames = self.tokenizer.decode(latent)[0].clamp_(-1, 1)
            video = join(video, frames, TEMPORAL_COMPRESSION * start) if start else frames
        return video

    def _denoise(self, ids: Tensor, text: Tensor, noise: Tensor) -> Tensor:
        """Ids [8, h, w], text [1, M, 1024] and noise [1, 16, 8, 2h, 2w] to the latent, on every rank."""
        group = self.network.group
        mine = slice(None)
        if group is not None:
            count = CHUNK // group.size()
            mine = slice(group.rank() * count, (group.rank() + 1) * count)
        # Without ids means id 0 everywhere, which is what the network was trained with.
        branches = torch.stack([ids[mine], torch.zeros_like(ids[mine])])
        local = noise[:, :, mine].to(self.device)
        latent = sample(lambda scaled, level: self.network(scaled, branches, text, level), local, noise_levels())
        if group is None:
            return latent
        parts = [torch.empty_like(latent) for _ in range(group.size())]
        dist.all_gather(parts, latent.contiguous(), group=group)
        return torch.cat(parts, dim=2)

    def _check(self, ids: Tensor, text: Tensor) -> Tensor:
        """Returns the text on the device."""
        vocab, channels = self.network.size.vocab_size, self.network.size.text_channels
        if ids.ndim != 3 or not ids.numel():
            raise ValueError(f"ids must be [T, h, w] and not empty, got {list(ids.shape)}")
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= vocab:
            raise ValueError(f"ids go from {low} to {high}; the diffusion decoder knows 0 to {vocab - 1}")
        if text.ndim != 3 or len(text) != 1 or text.size(2) != channels:
            raise ValueError(f"a text embedding must be [1, M, {channels}], got {list(text.shape)}")
        return text.to(self.device)


def check_processes(count: int) -> None:
    """Whether so many processes can share the latent frames; raises ValueError if not."""
    if CHUNK % count:
        raise ValueError(
            f"the diffusion decoder's {CHUNK} latent frames cannot be shared by {count} processes; start 1, 2, 4 or 8, "
            "or generate with --disable_diffusion_decoder"
        )


def chunk_starts(frames: int) -> list[int]:
    """First latent frame of each chunk of 8; the last chunk ends with the clip and may so share more than 2 frames."""
    last = max(frames - CHUNK, 0)
    return [*range(0, last, CHUNK - OVERLAP), last]


def reflected(frames: int, length: int) -> Tensor:
    """Numbers of the frames that fill a clip up: forwards and backwards in turn, 0 1 2 3 4 3 2 1 for 5 to 8."""
    period = max(2 * (frames - 1), 1)
    steps = torch.arange(length) % period
    return torch.minimum(steps, period - steps) if frames > 1 else torch.zeros(length, dtype=torch.int64)


def join(video: Tensor, frames: Tensor, start: int) -> Tensor:
    """Appends a chunk whose first frame is frame ``start`` of the video.

    Both have the video's last frames; in the last 9 of these the chunk fades in, from nothing to all. The original
    counts latent frames for this, and so joins pictures of different moments.

    Args:
        video: [3, F, H, W].
        frames: [3, G, H, W], start + G > F >= start + 9.
        start: number of a frame.

    Returns:
        [3, start + G, H, W].
    """
    shared = video.size(1) - start
    assert _FADE <= shared < frames.size(1), (shared, frames.shape)
    weight = torch.linspace(0, 1, _FADE, device=frames.device)[:, None, None]
    fading = torch.lerp(video[:, -_FADE:], frames[:, shared - _FADE : shared], weight)
    return torch.cat([video[:, :-_FADE], fading, frames[:, shared:]], dim=1)
