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
    source = (frames.shape[-2], frames.shape[-1])
    size, top, left = cover(source, (height, width))
    if size != source:
        # On a CPU, one frame at a time stays in the cache: half the time and a thirtieth of the memory.
        at_once = 1 if frames.device.type == "cpu" else 11
        frames = torch.cat([_resize(frame, size) for frame in frames.split(at_once)])
    return frames[..., top : top + height, left : left + width]


def cover(source: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], int, int]:
    """How frames are scaled until they cover the target, keeping the aspect ratio.

    Args:
        source: height and width of the frames, pixels.
        target: height and width of the result, pixels.

    Returns:
        Height and width after scaling, and the first row and column of the centre that is cut out.
    """
    ratio = max(target[0] / source[0], target[1] / source[1])
    size = (int(ratio * source[0] + 0.5), int(ratio * source[1] + 0.5))
    top, left = (round((size[i] - target[i]) / 2) for i in range(2))  # half to even, too
    return size, top, left


def _resize(frames: Tensor, size: tuple[int, int]) -> Tensor:
    resized = F.interpolate(frames.to(torch.float32), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255).round_().to(torch.uint8)  # rounds half to even


def normalize(frames: Tensor) -> Tensor:
    """Maps frames [T, 3, H, W] uint8 to a video [3, T, H, W] float32 in [-1, 1]."""
    return frames.transpose(0, 1).to(torch.float32).div_(255).sub_(0.5).div_(0.5)
