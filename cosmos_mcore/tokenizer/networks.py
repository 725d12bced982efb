"""Encoder and decoder of the released factorised causal tokenizers (spec/tokenizer.md sections 2 and 6).

Parameter names and shapes are the released ones. The Haar patching runs in float32, everything between the first and
the last convolution in the dtype of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosmos_mcore.tokenizer import wavelet
from cosmos_mcore.tokenizer.causal_layers import (
    CausalConv3d,
    Downsample,
    FrameNorm,
    ResidualBlock,
    SpatialAttention,
    TemporalAttention,
    Upsample,
    factorised_conv,
    swish,
)

_BANDS = 3 * wavelet.PATCH**3
_MULTIPLIERS = (2, 4, 4)
_ENCODER_BLOCKS, _DECODER_BLOCKS = 2, 3
_Z_CHANNELS = 16


@dataclass(frozen=True)
class NetworkSize:
    """What tells one released tokenizer from another.

    Attributes:
        spatial_compression: 16 or 8.
        latent_channels: numbers of each latent cell: 6 (discrete) or 16 (continuous).
        channels: width of the narrowest level; 128 in the releases.
    """

    spatial_compression: int
    latent_channels: int
    channels: int = 128

    @property
    def resizes(self) -> list[tuple[bool, bool]]:
        """(spatial, temporal) of the resizing after each of the three levels: patching has done a factor of 4."""
        return [(True, True), (self.spatial_compression == 16, False), (False, False)]


DV8X16X16 = NetworkSize(spatial_compression=16, latent_channels=6)
# A norm of each network, and how many times the narrowest level it is wide.
ENCODER_NORM = ("encoder.norm_out.norm.weight", _MULTIPLIERS[-1])
DECODER_NORM = ("decoder.norm_out.norm.weight", _MULTIPLIERS[0])


class Encoder(nn.Module):
    """Frames to the numbers that are quantised: parameters ``encoder.*`` and ``quant_conv.*``."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.encoder = _Encoder(size)
        self.quant_conv = CausalConv3d(_Z_CHANNELS, size.latent_channels, (1, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        """[B, 3, 1 + 8k, H, W] to [B, latent_channels, 1 + k, h, w] in the dtype of the parameters."""
        weight = self.quant_conv.conv3d.weight
        bands = wavelet.patch(video).to(weight.dtype, memory_format=torch.channels_last_3d)
        return self.quant_conv(self.encoder(bands))


class Decoder(nn.Module):
    """Codes to frames: parameters ``post_quant_conv.*`` and ``decoder.*``."""

    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        self.post_quant_conv = CausalConv3d(size.latent_channels, _Z_CHANNELS, (1, 1, 1))
        self.decoder = _Decoder(size)

    def forward(self, codes: Tensor) -> Tensor:
        """[B, latent_channels, 1 + k, h, w] to float32 [B, 3, 1 + 8k, H, W], not clamped."""
        weight = self.post_quant_conv.conv3d.weight
        codes = codes.to(weight.dtype, memory_format=torch.channels_last_3d)
        return wavelet.unpatch(self.decoder(self.post_quant_conv(codes)))


class _Mid(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = nn.Sequential(SpatialAttention(channels), TemporalAttention(channels))
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, video: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(video)))


class _Level(nn.Module):
    """Residual blocks and, on most levels, a change of size."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, name: str, resize: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(out_channels if number else in_channels, out_channels) for number in range(blocks)
        )
        self.resize = name
        self.add_module(name, resize)

    def forward(self, video: Tensor) -> Tensor:
        for block in self.block:
            video = block(video)
        resize = getattr(self, self.resize)
        return video if resize is None else resize(video)


class _Encoder(nn.Module):
    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        width, levels = size.channels, []
        self.conv_in = factorised_conv(_BANDS, width)
        for multiplier, (spatial, temporal) in zip(_MULTIPLIERS, size.resizes, strict=True):
            out = size.channels * multiplier
            resize = Downsample(out, temporal=temporal) if spatial else None
            levels.append(_Level(width, out, _ENCODER_BLOCKS, "downsample", resize))
            width = out
        self.down = nn.ModuleList(levels)
        self.mid = _Mid(width)
        self.norm_out = FrameNorm(width)
        self.conv_out = factorised_conv(width, _Z_CHANNELS)

    def forward(self, bands: Tensor) -> Tensor:
        video = self.conv_in(bands)
        for level in self.down:
            video = level(video)
        return self.conv_out(swish(self.norm_out(self.mid(video))))


class _Decoder(nn.Module):
    def __init__(self, size: NetworkSize) -> None:
        super().__init__()
        width, levels = size.channels * _MULTIPLIERS[-1], []
        self.conv_in = factorised_conv(_Z_CHANNELS, width)
        self.mid = _Mid(width)
        # The decoder's resizing comes one level later than the encoder's, the levels run from the last to the first.
        resizes = [(False, False), *size.resizes[:-1]]
        for multiplier, (spatial, temporal) in reversed(list(zip(_MULTIPLIERS, resizes, strict=True))):
            out = size.channels * multiplier
            resize = Upsample(out, temporal=temporal) if spatial else None
            levels.append(_Level(width, out, _DECODER_BLOCKS, "upsample", resize))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = FrameNorm(width)
        self.conv_out = factorised_conv(width, _BANDS)

    def forward(self, z: Tensor) -> Tensor:
        video = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            video = level(video)
        return self.conv_out(swish(self.norm_out(video)))
