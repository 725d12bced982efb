"""Images as videos of one frame."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageOps

from cosmos_mcore.data.mp4 import UnreadableVideoError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MISTAKES = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # Pillow's, for damaged files


def is_image(path: str) -> bool:
    """Whether a file is an image, by its name."""
    return path.lower().endswith(_SUFFIXES)


def check_image(path: str | os.PathLike[str]) -> None:
    """Looks at an image's header.

    Raises:
        UnreadableVideoError: if it is missing or no image.
    """
    try:
        Image.open(path).close()
    except _MISTAKES as error:
        raise UnreadableVideoError(f"cannot be opened ({_reason(error)})") from error


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads an image upright, as RGB frames uint8 [1, H, W, 3].

    Raises:
        UnreadableVideoError: if it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8 instead of scaling
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return np.asarray(upright.convert("RGB"))[None].copy()
    except _MISTAKES as error:
        raise UnreadableVideoError(f"cannot be read ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
