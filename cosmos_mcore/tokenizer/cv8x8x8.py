"""The decoder of the released continuous video tokenizer, CV8x8x8 (spec/tokenizer.md section 6).

Only the diffusion decoder uses it, and only this half: 8x8 pixels and 8 frames per latent cell of 16 numbers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cosmos_mcore.tokenizer.causal_layers import FrameNorm
from cosmos_mcore.tokenizer.jit_file import read_jit_weights
from cosmos_mcore.tokenizer.networks import DECODER_NORM, Decoder, NetworkSize
from cosmos_mcore.tokenizer.released_file import check_tensors, read_channels

DECODER_FILE, STATISTICS_FILE = "decoder.jit", "mean_std.pt"
LATENT_CHANNELS = 16
CHUNK = 8  # latent frames that the statistics are used for

# Left in the file by tracing; a bfloat16 export has rounded the wavelet, so it must not be used.
_CONSTANTS = {
    "decoder.unpatcher3d.wavelets",
    "decoder.unpatcher3d._arange",
    "decoder.unpatcher3d.patch_size_buffer",
}


class ContinuousDecoder:
    """Normalised latents to frames: bfloat16 on GPUs, float32 elsewhere.

    Args:
        network: with weights.
        mean: [16, frames] of latents, one column per latent frame of a chunk.
        std: likewise.
        device: where it runs.
    """

    def __init__(self, network: Decoder, mean: Tensor, std: Tensor, device: torch.device) -> None:
        network.requires_grad_(False).eval()
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        network.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        for module in network.modules():
            if isinstance(module, FrameNorm):
                module.float()  # they compute in float32
        self.network = network
        # Rounded, as they were when the diffusion network learned to make latents of this scale.
        self._mean, self._std = (
            part.to(device, torch.bfloat16).float().view(1, LATENT_CHANNELS, -1, 1, 1) for part in (mean, std)
        )

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device) -> ContinuousDecoder:
        """Loads ``decoder.jit``, without running anything in it, and ``mean_std.pt``.

        Raises:
            ValueError: if a file is missing or damaged, or its tensors are not those of this tokenizer.
        """
        path = folder / DECODER_FILE
        weights = {name: tensor for name, tensor in read_jit_weights(path).items() if name not in _CONSTANTS}
        channels = read_channels(path, "CV8x8x8", weights, *DECODER_NORM)
        network = Decoder(NetworkSize(spatial_compression=8, latent_channels=LATENT_CHANNELS, channels=channels))
        check_tensors(path, "CV8x8x8", weights, network.state_dict())
        network.load_state_dict(weights)
        return cls(network, *_read_statistics(folder / STATISTICS_FILE), device)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Turns the latent frames of one causal clip into frames.

        Args:
            latent: [1, 16, T, h, w], normalised, T at most 8. By causality, a leading part of a clip decodes as it
                would in the whole.

        Returns:
            [1, 3, 8 (T - 1) + 1, 8h, 8w] float32, nominally in [-1, 1], on the device.
        """
        frames = latent.size(2)
        mean, std = self._mean[:, :, :frames], self._std[:, :, :frames]
        assert mean.size(2) == frames, f"{frames} latent frames are more than a chunk"
        return self.network(latent.float() * std + mean)


def _read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [16, 8] each."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; download it again") from None
    except Exception as error:  # torch.load has many ways to say it; the first line names the reason
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); download it again") from None
    if (
        not isinstance(content, (tuple, list))
        or [type(part) for part in content] != [Tensor, Tensor]
        or any(part.numel() % LATENT_CHANNELS or part.numel() < LATENT_CHANNELS * CHUNK for part in content)
    ):
        raise ValueError(
            f"{path} does not hold mean and deviation of 16 numbers for 8 latent frames; download it again"
        )
    mean, std = (part.reshape(LATENT_CHANNELS, -1)[:, :CHUNK] for part in content)
    return mean, std
