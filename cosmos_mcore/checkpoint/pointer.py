"""Names of a run's checkpoints and the file that points at the newest. Imports no torch, for early checks."""

from __future__ import annotations

from pathlib import Path

LATEST = "latest_checkpoint.txt"


def checkpoint_name(iteration: int) -> str:
    """Folder name of a checkpoint."""
    return f"iter_{iteration:09d}"


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
    path = folder / pointer.read_text().strip()
    if not is_distributed(path):
        raise ValueError(
            f"{pointer} names {path.name}, which is not a complete checkpoint; write the name of another folder into "
            "that file, or delete it to start afresh"
        )
    return path
