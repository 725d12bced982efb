"""From decoded frames to the tokenizer's input (spec/data.md section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_and_crop(frames: Tensor, height: int, width: int) -> Tensor:
    """Scales frames until they cover the target, keeping the aspect ratio, and cuts out the centre.

    Args:
        frames: [T, 3, h, w], uint8.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        [T, 3, height, width], uint8.
    """
    source_height, source_width = frames.shape[-2:]
    ratio = max(width / source_width, height / source_height)
    size = (int(ratio * source_height + 0.5), int(ratio * source_width + 0.5))
    if size != (source_height, source_width):
        # On a CPU, one frame at a time stays in the cache: half the time and a thirtieth of the memory.
        at_once = 1 if frames.device.type == "cpu" else 11
        frames = torch.cat([_resize(frame, size) for frame in frames.split(at_once)])
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)  # half to even, too
    return frames[..., top : top + height, left : left + width]


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(frames.to(torch.float32), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255).round_().to(torch.uint8)  # rounds half to even


def normalize(frames: Tensor) -> Tensor:
    """Maps frames [T, 3, H, W] uint8 to a video [3, T, H, W] float32 in [-1, 1]."""
    return frames.transpose(0, 1).to(torch.float32).div_(255).sub_(0.5).div_(0.5)
