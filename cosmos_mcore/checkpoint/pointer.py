"""Names of a run's checkpoints and the file that points at the newest. Imports no torch, for early checks."""

from __future__ import annotations

import os
from pathlib import Path

LATEST = "latest_checkpoint.txt"


def checkpoint_name(iteration: int) -> str:
    """Folder name of a checkpoint."""
    return f"iter_{iteration:09d}"


def iteration_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(path.name.rpartition("_")[2])


def complete_checkpoints(folder: Path) -> list[Path]:
    """All complete checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob("iter_*[0-9]") if is_distributed(path))


def is_distributed(path: Path) -> bool:
    """Whether ``path`` is a folder in Megatron's distributed format, completely written."""
    return (path / "metadata.json").is_file()


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint that ``latest_checkpoint.txt`` in ``folder`` names, or None.

    Raises:
        ValueError: if the file names a checkpoint that is not there.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return None
    path = folder / pointer.read_text(errors="replace").strip()
    if not is_distributed(path):
        raise ValueError(
            f"{pointer} names {path.name}, which is not a complete checkpoint; write the name of another folder into "
            "that file, or delete it to start afresh"
        )
    return path


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a run can go on from: the one that ``latest_checkpoint.txt`` names, then those before it.

    Raises:
        ValueError: if the file names a checkpoint that is not there, and there is none before it.
    """
    pointer = folder / LATEST
    if not pointer.exists():
        return []
    named = folder / pointer.read_text(errors="replace").strip()
    found = [path for path in reversed(complete_checkpoints(folder)) if path.name <= named.name]
    if not found:
        latest_checkpoint(folder)  # raises
    return found


def write_latest(folder: Path, name: str) -> None:
    """Makes ``latest_checkpoint.txt`` name another checkpoint, in one step, and puts that on disk."""
    temporary = folder / f"{LATEST}.incomplete"
    with open(temporary, "w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / LATEST)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
