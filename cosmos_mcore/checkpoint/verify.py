"""Compares two checkpoints of any layouts: every tensor byte for byte, then the outputs of the model they make."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cosmos_mcore.checkpoint.architecture import check_tensors, describe
from cosmos_mcore.checkpoint.files import ahead
from cosmos_mcore.checkpoint.load import set_weights
from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.checkpoint.reader import MASTER, MOMENTS, WEIGHT, Checkpoint
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.torch_file import tensor_bytes
from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import DTYPES, build_model
from cosmos_mcore.parallel import initialize as groups

_LATENT_SHAPE = (2, 4, 4)  # of the random clip that goes through the model
_TEXT_LENGTH = 8
_SPARE_BYTES = 2**30  # beside the weights: activations and the buffers of loading


@dataclass
class Side:
    """What was found in one checkpoint."""

    path: Path
    layout: str
    tensors: int = 0
    bytes: int = 0
    digest: str = ""


@dataclass
class Report:
    """The outcome of a comparison.

    Attributes:
        sides: both checkpoints.
        model: which model they hold.
        largest_difference: over all elements of all tensors.
        different: names of tensors whose bytes, shapes or dtypes differ.
        forward: what the runs through the model showed.
        equal: whether nothing differs.
    """

    sides: tuple[Side, Side]
    model: str
    largest_difference: float = 0.0
    different: list[str] = field(default_factory=list)
    forward: str = ""
    equal: bool = False

    def table(self) -> str:
        """The outcome as text."""
        rows = [("", "layout", "tensors", "bytes", "SHA-256")]
        for name, side in zip(("input", "output"), self.sides, strict=True):
            rows.append((name, side.layout, f"{side.tensors:,}", f"{side.bytes:,}", side.digest))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"model               {self.model}", f"largest difference  {self.largest_difference:g}"]
        if self.different:
            more = f" and {len(self.different) - 3} more" if len(self.different) > 3 else ""
            lines.append(f"different           {', '.join(self.different[:3])}{more}")
        lines += [
            f"forward             {self.forward}",
            f"result              {'equal' if self.equal else 'DIFFERENT'}",
        ]
        return "\n".join(lines)


def verify(source: Path, output: Path, model_size: str = "auto") -> Report:
    """Re-reads both checkpoints tensor by tensor and compares them; runs the model if it fits into memory.

    What an optimizer keeps is compared where both have it, Adam's moments in the dtype of the output.

    Raises:
        ValueError: if one cannot be opened, or they hold different models.
    """
    first, second = open_checkpoint(source, model_size), open_checkpoint(output, model_size)
    check_tensors(original_shapes(second.arch), original_shapes(first.arch), f"{output}, compared with {source},")
    report = Report((Side(source, first.layout), Side(output, second.layout)), describe(first.arch))
    _compare(first, second, report)
    report.forward, same_output = _run_model(first, second)
    report.equal = not report.different and same_output
    return report


def _compare(first: Checkpoint, second: Checkpoint, report: Report) -> None:
    digests = (hashlib.sha256(), hashlib.sha256())
    states = (WEIGHT, *MOMENTS) if first.training and second.training else (WEIGHT,)
    if first.has_master and second.has_master:
        states = (*states, MASTER)
    items = [(name, state) for name in first.names for state in states]
    for name, state, one, other in ahead((*item, first.read(*item), second.read(*item)) for item in items):
        if state in MOMENTS:
            one = one.to(other.dtype)
        for side, digest, tensor in zip(report.sides, digests, (one, other), strict=True):
            side.tensors += 1
            side.bytes += tensor.nbytes
            digest.update(f"{name} {state} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
        if one.dtype != other.dtype or not _same_bytes(one, other):
            report.different.append(name if state == WEIGHT else f"{state} of {name}")
            difference = (one.double() - other.double()).abs().max().item()
            report.largest_difference = max(report.largest_difference, difference)
        first.release(name, state)
        second.release(name, state)
    for side, digest in zip(report.sides, digests, strict=True):
        side.digest = digest.hexdigest()


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Unlike comparison of values, this tells -0 from 0 and finds NaN equal to itself."""
    flat = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(*flat)


def _run_model(first: Checkpoint, second: Checkpoint) -> tuple[str, bool]:
    """Runs both through the model on the same random tokens; says what came out, and whether it is the same."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = sum(first.dtype(name).itemsize * _numel(shape) for name, shape in original_shapes(first.arch).items())
    free = _free_memory(device)
    if size + _SPARE_BYTES > free:
        need = (size + _SPARE_BYTES) / 2**30
        return f"skipped: the model needs {need:.1f} GiB on the {device.type}, {free / 2**30:.1f} GiB are free", True
    outputs = _logits(first, second)
    difference = (outputs[0] - outputs[1]).abs().max().item()
    same = _same_bytes(outputs[0], outputs[1])
    return f"{outputs[0].size(0)} random tokens, largest difference of the logits {difference:g}", same


def _logits(*checkpoints: Checkpoint) -> list[Tensor]:
    """Logits [S, V] in float32 of each checkpoint, on the same tokens (and text, for models that read it)."""
    arch = checkpoints[0].arch
    config = RunConfig()
    dtype = checkpoints[0].dtype("norm.weight")
    config.precision.dtype = "bf16" if dtype is torch.bfloat16 else "fp32"
    device = groups.initialize(config.parallel, seed=0)
    try:
        layout = VideoLayout(1, _LATENT_SHAPE, arch.text_to_video, 0, 0)
        length = layout.sequence_length
        layout = VideoLayout(1, _LATENT_SHAPE, arch.text_to_video, length, 0)
        chunks = build_model(config, arch, layout, device)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(arch.vocab_size, (1, length), generator=generator).to(device)
        context = None
        if arch.context_size is not None:
            context = torch.randn(_TEXT_LENGTH, 1, arch.context_size, generator=generator)
            context = context.to(device, DTYPES[config.precision.dtype])
        outputs = []
        for checkpoint in checkpoints:
            set_weights(chunks, arch, checkpoint.read)
            with torch.no_grad():
                outputs.append(chunks[0](tokens, context=context)[:, 0].float().cpu())
        return outputs
    finally:
        groups.shut_down()


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
