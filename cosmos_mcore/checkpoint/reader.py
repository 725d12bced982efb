"""A checkpoint of any layout, seen as the original's full tensors, read one at a time."""

from __future__ import annotations

import itertools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cosmos_mcore.checkpoint.architecture import arch_of_size, check_tensors
from cosmos_mcore.checkpoint.files import ahead, fetch_pages, release_pages
from cosmos_mcore.checkpoint.names import original_shapes, part_shape, stored_tensors
from cosmos_mcore.checkpoint.torch_file import block_rows
from cosmos_mcore.model.presets import ModelArch

logger = logging.getLogger(__name__)

WEIGHT, EXP_AVG, EXP_AVG_SQ, MASTER = "weight", "exp_avg", "exp_avg_sq", "master"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # FP8 and integers mean nothing without scales
# Replicated tensors of one model may differ between tensor-parallel ranks, since the original never sums the gradients
# of the q/k-norms over them; this much is averaged away, as its merge tool does (spec/checkpoint.md section 3).
_REPLICA_ATOL, _REPLICA_RTOL = 5e-2, 0.1


@dataclass(frozen=True)
class TrainingState:
    """What a training checkpoint holds beside the tensors.

    Attributes:
        iteration: optimizer steps done.
        step: Adam's step count.
        param_group: hyperparameters of the optimizer (``lr``, ``betas``, ``eps``, ``weight_decay`` ...).
        scheduler: the original's scheduler state; empty where the layout has none.
        consumed_samples: how far the data was read; None where the layout does not say.
    """

    iteration: int
    step: float
    param_group: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    consumed_samples: int | None = None


class Checkpoint(ABC):
    """Weights, and Adam's moments where there are any, under the original's names without the ``model.`` prefix.

    Attributes:
        path: what was opened.
        layout: ``monolithic``, ``mp``, ``te``, ``safetensors``, ``distributed`` or ``training``.
        arch: the model.
        training: progress and hyperparameters if Adam's moments are there, else None.
        has_master: whether the float32 weights that an optimizer keeps are there, too.
    """

    path: Path
    layout: str
    arch: ModelArch
    training: TrainingState | None = None
    has_master: bool = False

    @property
    def names(self) -> list[str]:
        """All tensors' names, in the original's order."""
        return list(original_shapes(self.arch))

    @property
    @abstractmethod
    def files(self) -> set[Path]:
        """The files that the weights are read from."""

    @abstractmethod
    def dtype(self, name: str, state: str = WEIGHT) -> torch.dtype:
        """The dtype that ``read`` returns."""

    @abstractmethod
    def read(self, name: str, state: str = WEIGHT) -> Tensor:
        """Reads one full tensor.

        Args:
            name: the original's name.
            state: ``weight``, ``exp_avg``, ``exp_avg_sq`` or ``master``.

        Raises:
            ValueError: naming file and tensor, if the bytes are damaged.
        """

    def read_blocks(self, name: str, state: str = WEIGHT) -> Iterator[Tensor]:
        """As ``read``, but in pieces that follow each other along the first axis, each as small as is convenient.

        Read them all: damaged bytes may be noticed as late as at the end of a tensor.
        """
        yield self.read(name, state)

    def stream(self, names: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
        """Reads weights to write them, in pieces that the processor's cache holds from one to the other.

        A second thread reads and checks a few pieces ahead; the disk works on the next tensor meanwhile.

        Yields:
            Each of ``names``, the first row of a piece along its first axis, and the piece, which may be used until the
            next one is asked for.

        Raises:
            ValueError: as ``read``; what was given before may be damaged, too.
        """

        def pieces() -> Iterator[tuple[str, int, Tensor]]:
            for name, following in zip(names, (*names[1:], None), strict=True):
                if following is not None:
                    self.fetch(following)
                row = 0
                for block in self.read_blocks(name):
                    yield name, row, block
                    row += block.size(0)

        threads, read = torch.get_num_threads(), ""
        torch.set_num_threads(1)  # more would cut each small piece up once more, and spin while they wait
        try:
            for piece in ahead(pieces()):
                if read and read != piece[0]:
                    self.release(read)
                read = piece[0]
                yield piece
            if read:
                self.release(read)
        finally:
            torch.set_num_threads(threads)

    def fetch(self, name: str) -> None:
        """Starts reading a weight that will be asked for soon."""
        return None

    def release(self, name: str, state: str = WEIGHT) -> None:
        """Gives back the memory behind a tensor that has been read; using it again reads it again."""
        return None


class TensorFile(Protocol):
    """A file with mapped tensors."""

    path: Path

    def check(self, tensor: Tensor, name: str) -> None:
        """Raises ValueError if the tensor's bytes do not match their checksum."""

    def blocks(self, tensor: Tensor, name: str, rows: int) -> Iterator[Tensor]:
        """Checks and gives ``rows`` rows after the other; raises ValueError at the end at the latest."""


@dataclass(frozen=True)
class FileTensor:
    """A mapped tensor and the file it lies in."""

    tensor: Tensor
    file: TensorFile


class FilesCheckpoint(Checkpoint):
    """Any layout that is made of files with named tensors: one set of tensors per tensor-parallel rank."""

    def __init__(
        self,
        path: Path,
        layout: str,
        naming: str,
        ranks: Sequence[Mapping[str, FileTensor]],
        model_size: str = "auto",
    ) -> None:
        """Checks names and shapes against the table.

        Args:
            path: what was opened, for messages.
            layout: its name.
            naming: the column of the name table that the names come from.
            ranks: the tensors of each tensor-parallel rank, by name without the ``model.`` prefix.
            model_size: as ``--model_size``.

        Raises:
            ValueError: if tensors are missing, unexpected, misshapen or no floating-point numbers.
        """
        self.path, self.layout = path, layout
        full = _full_shapes(ranks[0], naming, len(ranks))
        self.arch = arch_of_size(model_size, full, str(path))
        stored = stored_tensors(self.arch, naming)
        shapes = original_shapes(self.arch)
        expected = {tensor.name: part_shape(tensor, shapes, len(ranks)) for tensor in stored}
        for tensors in ranks:
            files = sorted({str(entry.file.path) for entry in tensors.values()})
            check_tensors({name: tuple(entry.tensor.shape) for name, entry in tensors.items()}, expected, files[0])
            for name, entry in tensors.items():
                if entry.tensor.dtype not in _FLOATS:
                    raise ValueError(f"{entry.file.path}: {name} is {entry.tensor.dtype}, which is no dtype of weights")
                if entry.tensor.dtype != ranks[0][name].tensor.dtype:
                    raise ValueError(f"{files[0]}: {name} is {entry.tensor.dtype}, unlike in the first shard")
        self._stored = {name: tensor for tensor in stored for name in tensor.originals}
        self._ranks = ranks
        self._moments: Sequence[Mapping[tuple[str, str], FileTensor]] = ()

    def add_training(self, training: TrainingState, moments: Sequence[Mapping[tuple[str, str], FileTensor]]) -> None:
        """Adds progress, and Adam's moments of each rank by (state, the original's name), shaped as the weights."""
        self.training, self._moments = training, moments

    @property
    def tensor_parallel_size(self) -> int:
        """How many shards each tensor is cut in."""
        return len(self._ranks)

    @property
    def files(self) -> set[Path]:
        """See ``Checkpoint``."""
        return {entry.file.path for tensors in self._ranks for entry in tensors.values()}

    def dtype(self, name: str, state: str = WEIGHT) -> torch.dtype:
        """See ``Checkpoint``."""
        return self._parts(name, state)[0].tensor.dtype

    def read(self, name: str, state: str = WEIGHT) -> Tensor:
        """See ``Checkpoint``."""
        rows = self._read_rows(name, state)
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def read_blocks(self, name: str, state: str = WEIGHT) -> Iterator[Tensor]:
        """See ``Checkpoint``."""
        stored, parts = self._stored[name], self._parts(name, state)
        fused = state == WEIGHT and len(stored.originals) > 1
        if fused or (len(parts) > 1 and stored.split_axis is None):
            yield from self._read_rows(name, state)
            return
        axis = stored.split_axis or 0
        rows = block_rows(parts[0].tensor, len(parts) if axis else 1)
        blocks = [part.file.blocks(part.tensor, name, rows) for part in parts]
        if axis == 0 or len(blocks) == 1:
            yield from itertools.chain(*blocks)
        else:
            for row in zip(*blocks, strict=True):
                yield torch.cat(row, axis)

    def _read_rows(self, name: str, state: str) -> list[Tensor]:
        """As ``read``, but in pieces that follow each other along the first axis: nothing is joined in memory."""
        stored, parts = self._stored[name], []
        for entry in self._parts(name, state):
            entry.file.check(entry.tensor, name)
            tensor = entry.tensor
            if state == WEIGHT and len(stored.originals) > 1:
                tensor = tensor.chunk(len(stored.originals))[stored.originals.index(name)]
            parts.append(tensor)
        if len(parts) == 1 or stored.split_axis == 0:
            return parts
        if stored.split_axis is None:
            return [self._replicated(parts, name, state)]
        return [torch.cat(parts, stored.split_axis)]

    def fetch(self, name: str) -> None:
        """See ``Checkpoint``."""
        for entry in self._parts(name, WEIGHT):
            fetch_pages(entry.tensor)

    def release(self, name: str, state: str = WEIGHT) -> None:
        """See ``Checkpoint``."""
        for entry in self._parts(name, state):
            release_pages(entry.tensor)

    def _parts(self, name: str, state: str) -> list[FileTensor]:
        if state == WEIGHT:
            return [tensors[self._stored[name].name] for tensors in self._ranks]
        return [tensors[state, name] for tensors in self._moments]

    def _replicated(self, parts: list[Tensor], name: str, state: str) -> Tensor:
        if all(torch.equal(part, parts[0]) for part in parts[1:]):
            return parts[0]
        mean = torch.stack([part.float() for part in parts]).mean(0)
        if state == WEIGHT:
            if not torch.allclose(parts[0].float(), mean, atol=_REPLICA_ATOL, rtol=_REPLICA_RTOL):
                raise ValueError(
                    f"{self.path}: {name} should be the same in all {len(parts)} shards, but it is not: are these "
                    "shards of one model?"
                )
            logger.warning("%s: %s differs between the shards; their mean is taken", self.path, name)
        return mean.to(parts[0].dtype)


def _full_shapes(tensors: Mapping[str, FileTensor], naming: str, ranks: int) -> dict[str, tuple[int, ...]]:
    """Full shapes under the original's names, as far as names are known (others keep theirs)."""
    layers = [int(part) for name in tensors for part in name.split(".") if part.isdigit()]
    layers = [layer for layer in layers if layer < len(tensors)]
    table = {}
    for context in (None, 1):  # the widest table that the names may come from
        arch = ModelArch(num_layers=max(layers, default=0) + 1, hidden_size=1, context_size=context)
        table.update({tensor.name: tensor for tensor in stored_tensors(arch, naming)})
    shapes = {}
    for name, entry in tensors.items():
        stored, shape = table.get(name), list(entry.tensor.shape)
        if stored is None:
            shapes[name] = tuple(shape)
            continue
        if stored.split_axis is not None and stored.split_axis < len(shape):
            shape[stored.split_axis] *= ranks
        for original in stored.originals:
            shapes[original] = (shape[0] // len(stored.originals), *shape[1:]) if shape else ()
    return shapes
