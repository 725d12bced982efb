"""Any layout of a checkpoint to any other, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

from cosmos_mcore.checkpoint.hub_files import write_safetensors
from cosmos_mcore.checkpoint.original import shard_base, write_original
from cosmos_mcore.checkpoint.reader import Checkpoint
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.training_folder import write_training

LAYOUTS = ("monolithic", "mp", "te", "safetensors", "distributed", "training")


def convert(
    source: Path,
    output: Path,
    to: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    model_size: str = "auto",
    form: str = "prefixed",
    force: bool = False,
    keep_source: bool = False,
) -> list[Path]:
    """Writes the checkpoint at ``source`` in another layout.

    Nothing appears under the final names before everything is complete. Adam's moments go with the weights from and to
    ``training`` and ``distributed``; the other layouts have no place for them.

    Args:
        source: as for ``open_checkpoint``.
        output: ``X.pt`` for ``monolithic``, ``mp`` and ``te``; a folder for the others.
        to: one of ``LAYOUTS``.
        tensor_parallel_size: shards or chunks to cut tensors in; ``monolithic`` and ``safetensors`` have one.
        pipeline_parallel_size: groups of layers with files of their own; ``distributed`` only.
        model_size: of the source, as ``--model_size``.
        form: of the original's files: ``prefixed``, ``plain`` or ``nested``.
        force: replace existing outputs.
        keep_source: not if they are the source.

    Returns:
        The files.

    Raises:
        ValueError: one line, for anything the user can mend.
    """
    if to not in LAYOUTS:
        raise ValueError(f"--to {to} is unknown; known: {', '.join(LAYOUTS)}")
    if to in ("monolithic", "safetensors") and tensor_parallel_size != 1:
        raise ValueError(f"--to {to} is not cut in shards; leave --tensor_parallel_size away")
    if to != "distributed" and pipeline_parallel_size != 1:
        raise ValueError(f"--to {to} has no pipeline stages; leave --pipeline_parallel_size away")
    checkpoint = open_checkpoint(source, model_size)
    if keep_source and _replaces_source(checkpoint, output, to, tensor_parallel_size):
        raise ValueError(f"--verify compares with the input, but {output} would take its place; give another --output")
    if to == "distributed":
        # Only here: torch.distributed.checkpoint takes half a second to import, and the other layouts do not need it.
        from cosmos_mcore.checkpoint.distributed_writer import write_distributed

        return write_distributed(checkpoint, output, tensor_parallel_size, pipeline_parallel_size, force)
    if to == "training":
        return write_training(checkpoint, output, tensor_parallel_size, force)
    if to == "safetensors":
        return write_safetensors(checkpoint, output, force)
    naming = "te" if to == "te" else "originals"
    return write_original(checkpoint, output, tensor_parallel_size, naming, form, force, sharded_name=to == "mp")


def _replaces_source(checkpoint: Checkpoint, output: Path, to: str, tensor_parallel_size: int) -> bool:
    """Whether a file of the source lies where the output is to be, or is a shard that goes with the old output."""
    sources = {file.parent.resolve() / file.name for file in checkpoint.files}
    place = output.parent.resolve() / output.name
    if to == "training":
        return any(file.parent == place.resolve() for file in sources)
    if to in ("safetensors", "distributed"):
        return any(file.is_relative_to(place.resolve()) for file in sources)
    sharded = to == "mp" or tensor_parallel_size > 1
    return any((shard_base(file) if sharded else file) == place for file in sources)
