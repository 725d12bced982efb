"""What a file of released weights must hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def check_tensors(path: Path, owner: str, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Compares names and shapes.

    Args:
        path: the file, for messages.
        owner: whose weights they should be, as in "the file of DV8x16x16".
        found: the file's tensors.
        wanted: tensors of the same names and shapes as the network's.

    Raises:
        ValueError: naming the first tensor that is missing, unknown or of another shape.
    """
    for name in sorted({*found, *wanted}):
        if name not in found:
            raise ValueError(f"{path} has no tensor {name}; it is not the file of {owner}")
        if name not in wanted:
            raise ValueError(f"{path} has a tensor {name} that {owner} does not know; it is another network's file")
        if found[name].shape != wanted[name].shape:
            shapes = f"{list(found[name].shape)}, not {list(wanted[name].shape)}"
            raise ValueError(f"{path}: {name} has the shape {shapes}; it is another network's file")


def read_channels(path: Path, owner: str, found: Mapping[str, Tensor], norm: str, multiple: int) -> int:
    """Tells how wide a network's narrowest level is.

    Args:
        path: the file, for messages.
        owner: as in ``check_tensors``.
        found: the file's tensors.
        norm: name of a norm's gain.
        multiple: how many times the narrowest level that norm is wide.

    Raises:
        ValueError: if there is no such norm.
    """
    if norm not in found:
        raise ValueError(f"{path} has no tensor {norm}; it is not the file of {owner}")
    return found[norm].numel() // multiple
