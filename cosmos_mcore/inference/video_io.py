"""Reads what generation starts from, writes what it made."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError
from torch import Tensor

from cosmos_mcore.data.encode import encode_mp4
from cosmos_mcore.data.images import is_image, read_image
from cosmos_mcore.data.mp4 import Mp4File, UnreadableVideoError
from cosmos_mcore.data.transforms import normalize

logger = logging.getLogger(__name__)

DEFAULT_FPS = 25.0  # as the original writes all its videos
_MOST_COVERED = 50  # times the size that is cut out: an image of 1x10000 pixels would become 126 GB


def write_mp4(path: str | os.PathLike[str], video: Tensor, fps: float) -> Path:
    """Writes a video as H.264, yuv420p; the file appears only when it is complete.

    Args:
        path: where to write; the folder is made.
        video: [3, T, H, W] floating in [-1, 1] (clamped), or [T, H, W, 3] uint8; RGB, H and W even.
        fps: frames per second.

    Raises:
        ValueError: for a video of another shape, without frames, or of odd size.
    """
    return encode_mp4(path, to_frames(video), fps)


def to_frames(video: Tensor) -> np.ndarray:
    """Turns a video into frames uint8 [T, H, W, 3].

    Args:
        video: [3, T, H, W] floating in [-1, 1] (clamped, rounded), or already [T, H, W, 3] uint8; any device.

    Raises:
        ValueError: for another shape or dtype.
    """
    if video.dtype == torch.uint8 and video.ndim == 4 and video.size(3) == 3:
        return video.cpu().numpy()
    if not video.is_floating_point() or video.ndim != 4 or video.size(0) != 3:
        raise ValueError(
            f"a video must be [3, T, H, W] floating or [T, H, W, 3] uint8, not {list(video.shape)} {video.dtype}"
        )
    grey_levels = ((video.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return grey_levels.permute(1, 2, 3, 0).contiguous().cpu().numpy()


def read_conditioning(
    path: str | os.PathLike[str], num_frames: int, height: int, width: int, frame_stride: int = 1
) -> Tensor:
    """Reads the frames that a generated video continues (spec/inference.md section 2).

    Args:
        path: an image (.png, .jpg, .jpeg, .webp; any colour mode), which gives one frame whatever ``num_frames`` says,
            or a video, of which the last ``num_frames`` frames are taken.
        num_frames: frames to take from a video.
        height: of the result, pixels.
        width: of the result, pixels.
        frame_stride: distance in frames between two frames taken from a video, as in training.

    Returns:
        float32 [1, 3, T, height, width] in [-1, 1], T = 1 for an image, else ``num_frames``: resized to cover the size,
        then cut at the centre.

    Raises:
        ValueError: if the file is missing, cannot be read, has too few frames, or frames far from the size's shape.
    """
    path = Path(path)
    if not os.path.isfile(path):  # which is False, too, where no file can have such a name
        raise ValueError(f"there is no file {path}; give the path of an image or a video")
    if is_image(path.name):
        if num_frames > 1:
            logger.info("%s is an image: it gives 1 conditioning frame, not %d", path, num_frames)
        frames = _read_image(path)
    else:
        frames = _read_last_frames(path, num_frames, frame_stride)
    return cover(normalize(torch.from_numpy(frames).permute(0, 3, 1, 2)), height, width)[None]


def frame_rate(path: str | os.PathLike[str], frame_stride: int = 1) -> float:
    """Frames per second of a video of which every ``frame_stride``-th frame is taken; for an image, 25."""
    if is_image(os.fspath(path)):
        return DEFAULT_FPS
    with Mp4File(path) as file:
        return float(file.rate or DEFAULT_FPS) / frame_stride


def cover(frames: Tensor, height: int, width: int) -> Tensor:
    """Resizes frames, in their aspect ratio until they cover a size, then cuts out the centre.

    See spec/inference.md section 2; unlike training's transform it never rounds to grey levels.

    Args:
        frames: [N, C, h, w] float32.
        height: of the result, pixels.
        width: of the result, pixels.

    Returns:
        [N, C, height, width] float32; antialiased bilinear.

    Raises:
        ValueError: if nearly all of the frames would be cut off.
    """
    h, w = frames.shape[-2:]
    ratio = max(width / w, height / h)
    size = (math.ceil(ratio * h), math.ceil(ratio * w))
    if size[0] * size[1] > _MOST_COVERED * height * width:
        raise ValueError(f"frames of {h}x{w} are too long and narrow to cut {height}x{width} out of; cut them before")
    frames = F.interpolate(frames, size, mode="bilinear", align_corners=False, antialias=True)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def _read_image(path: Path) -> np.ndarray:
    """Reads an image upright, as frames uint8 [1, H, W, 3]."""
    try:
        return read_image(path)
    except UnreadableVideoError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            raise ValueError(f"{path} is no image that can be read") from None
        raise ValueError(f"the image {path} cannot be read: {error.__cause__}") from error


def _read_last_frames(path: Path, count: int, stride: int) -> np.ndarray:
    """Reads every ``stride``-th frame up to the end of a video, as frames uint8 [count, H, W, 3]."""
    span = (count - 1) * stride + 1
    try:
        with Mp4File(path) as file:
            if file.num_frames < span:
                raise ValueError(f"{path} has {file.num_frames} frames, but {span} are needed; give a longer video")
            return file.read(range(file.num_frames - span, file.num_frames, stride))
    except UnreadableVideoError as error:
        raise ValueError(f"the video {path} {error}") from error
