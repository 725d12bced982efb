"""Layers of the causal video networks (spec/tokenizer.md section 2). No layer lets a frame see a later one.

Videos are [B, C, T, H, W]. In memory they lie channels last, so that a frame's convolution and a convolution over time
are both two-dimensional ones on views: [B*T, C, H, W] and [B, C, T, H*W]. These are the best kernels that cuDNN and
oneDNN have; neither a three-dimensional convolution nor a change of layout is ever needed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EPS = 1.0e-6


class CausalConv3d(nn.Module):
    """A convolution over time (kernel [k, 1, 1]) or within each frame (kernel [1, k, k]).

    Time is padded in front with copies of the first frame, a frame with zeros on all sides.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        *,
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: int = 0,
    ) -> None:
        """Takes channels, kernel and stride (time, height, width), and the zeros on each side of a frame."""
        super().__init__()
        assert kernel[0] == 1 or kernel[1:] == (1, 1), kernel
        # Never called: it holds the parameters under the released names and shapes.
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride=stride)
        self.padding = padding
        self.frames_in_front = kernel[0] - stride[0]

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T', H', W']."""
        weight, bias, stride = self.conv3d.weight, self.conv3d.bias, self.conv3d.stride
        if weight.shape[2] == 1:
            return _frames(F.conv2d(_merge(video), weight[:, :, 0], bias, stride[1:], self.padding), len(video))
        if self.frames_in_front:
            video = _repeat_first(video, self.frames_in_front)
        height, width = video.shape[-2:]
        rows = F.conv2d(video.flatten(3, 4), weight[..., 0], bias, (stride[0], 1))
        return rows.unflatten(3, (height, width))


class FrameNorm(nn.Module):
    """Group normalisation with one group: over all channels and pixels of each frame, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels, eps=_EPS)  # never called: it holds the parameters

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same."""
        batch, channels, frames, height, width = video.shape
        count = channels * height * width
        axes = (1, 3, 4)
        # Both sums read the video in its own dtype and add up in float32; torch's kernel would want channels first.
        mean = video.sum(axes, keepdim=True, dtype=torch.float32) / count
        square = torch.linalg.vector_norm(video, dim=axes, keepdim=True, dtype=torch.float32).square() / count
        scale = (square - mean.square()).clamp_(min=0).add_(_EPS).rsqrt_() * self.norm.weight.float().view(-1, 1, 1, 1)
        shift = self.norm.bias.float().view(-1, 1, 1, 1) - mean * scale
        return torch.addcmul(shift, video, scale, out=torch.empty_like(video))


def swish(video: Tensor) -> Tensor:
    """Multiplies by the sigmoid, in place."""
    return F.silu(video, inplace=True)


class ResidualBlock(nn.Module):
    """Two factorised convolutions (within frames, then over time) and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = FrameNorm(in_channels)
        self.conv1 = factorised_conv(in_channels, out_channels)
        self.norm2 = FrameNorm(out_channels)
        self.conv2 = factorised_conv(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1))

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C', T, H, W]."""
        inner = self.conv1(swish(self.norm1(video)))
        inner = self.conv2(swish(self.norm2(inner)))
        return inner.add_(self.nin_shortcut(video) if hasattr(self, "nin_shortcut") else video)


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = FrameNorm(channels)
        self.q = CausalConv3d(channels, channels, (1, 1, 1))
        self.k = CausalConv3d(channels, channels, (1, 1, 1))
        self.v = CausalConv3d(channels, channels, (1, 1, 1))
        self.proj_out = CausalConv3d(channels, channels, (1, 1, 1))


class SpatialAttention(_Attention):
    """One head over the positions of each frame, with a shortcut."""

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same."""
        normed = self.norm(video)
        q, k, v = (_merge(part(normed)).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = _one_head(q, k, v, causal=False).transpose(1, 2).unflatten(2, video.shape[-2:])
        return video + self.proj_out(_frames(seen, len(video)))


class TemporalAttention(_Attention):
    """One head over the frames at each position, each seeing itself and earlier ones, with a shortcut."""

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to the same."""
        normed = self.norm(video)
        q, k, v = (part(normed).permute(0, 3, 4, 2, 1).flatten(0, 2) for part in (self.q, self.k, self.v))
        seen = _one_head(q, k, v, causal=True)
        batch, _, _, height, width = video.shape
        return video + self.proj_out(seen.unflatten(0, (batch, height, width)).permute(0, 4, 3, 1, 2))


class Downsample(nn.Module):
    """Halves height and width, and with ``temporal`` the frames, too: T to (T + 1) / 2."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.conv1 = CausalConv3d(channels, channels, (1, 3, 3), stride=(1, 2, 2))
        if temporal:
            self.conv2 = CausalConv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))
        self.conv3 = CausalConv3d(channels, channels, (1, 1, 1))
        self.temporal = temporal

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C, T', H/2, W/2]."""
        padded = _frames(F.pad(_merge(video), (0, 1, 0, 1)), len(video))
        video = self.conv1(padded).add_(_frames(F.avg_pool2d(_merge(padded), 2), len(video)))
        if self.temporal:
            longer = _repeat_first(video, 1)
            video = self.conv2(longer).add_((longer[:, :, 0::2] + longer[:, :, 1::2]).mul_(0.5))
        return self.conv3(video)


class Upsample(nn.Module):
    """Doubles height and width, and with ``temporal`` the frames, too: T to 2 T - 1."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        if temporal:
            self.conv1 = CausalConv3d(channels, channels, (3, 1, 1))
        self.conv2 = CausalConv3d(channels, channels, (1, 3, 3), padding=1)
        self.conv3 = CausalConv3d(channels, channels, (1, 1, 1))
        self.temporal = temporal

    def forward(self, video: Tensor) -> Tensor:
        """[B, C, T, H, W] to [B, C, T', 2H, 2W]."""
        if self.temporal:
            if video.shape[2] > 1:
                video = video.repeat_interleave(2, dim=2)[:, :, 1:]
            video = self.conv1(video).add_(video)
        video = _frames(F.interpolate(_merge(video), scale_factor=2, mode="nearest"), len(video))
        return self.conv3(self.conv2(video).add_(video))


def factorised_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """A convolution within frames, then one over time."""
    return nn.Sequential(
        CausalConv3d(in_channels, out_channels, (1, 3, 3), padding=1),
        CausalConv3d(out_channels, out_channels, (3, 1, 1)),
    )


def _one_head(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Attention over axis 1 of [N, S, C]; torch has fast kernels only for tensors with an axis of heads."""
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=causal)[:, 0]


def _repeat_first(video: Tensor, count: int) -> Tensor:
    """[B, C, T, H, W] to [B, C, count + T, H, W] with copies of the first frame in front."""
    batch, channels, frames, height, width = video.shape
    shape = (batch, channels, count + frames, height, width)
    # Not torch.cat, which would lay the result out channels first.
    longer = torch.empty(shape, dtype=video.dtype, device=video.device, memory_format=torch.channels_last_3d)
    longer[:, :, :count] = video[:, :, :1]
    longer[:, :, count:] = video
    return longer


def _merge(video: Tensor) -> Tensor:
    """[B, C, T, H, W] to [B*T, C, H, W]; a view where the video lies channels last."""
    return video.transpose(1, 2).flatten(0, 1)


def _frames(frames: Tensor, batch: int) -> Tensor:
    """[B*T, C, H, W] to [B, C, T, H, W], a view."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
