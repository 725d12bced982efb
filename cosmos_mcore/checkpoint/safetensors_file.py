"""Files in the safetensors format, read through a mapping and written one tensor at a time.

The format is a little-endian 64-bit length, that many bytes of JSON (name to dtype, shape, first and last byte), and
the tensors' bytes. It holds no code and no checksums. The library of that name wants a whole file's tensors in memory.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_mcore.checkpoint.files import fetch_pages
from cosmos_mcore.checkpoint.torch_file import ExpectedTensors, TensorSpec, row_blocks, tensor_bytes

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # bytes; the library's own limit


class SafetensorsFile:
    """A safetensors file whose tensors are mapped from disk.

    Attributes:
        path: the file.
        tensors: by name.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file; no tensor is read yet.

        Raises:
            ValueError: if it is not a complete safetensors file.
        """
        self.path = path
        try:
            size = path.stat().st_size
            with open(path, "rb") as file:
                length = struct.unpack("<Q", file.read(8))[0]
                if length > min(_MAX_HEADER, size - 8):
                    raise ValueError
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(value) for name, value in header.items()}
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        except (struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is truncated or is not a safetensors file; copy or download it again") from None
        start = 8 + length
        for name, (spec, first, last) in entries.items():
            if not 0 <= first <= last <= size - start:
                raise ValueError(f"{path} is truncated: {name} ends after the file; copy or download it again")
            if last - first != math.prod(spec.shape) * spec.dtype.itemsize:
                raise ValueError(f"{path} is corrupted: {name} does not have as many bytes as its shape needs")
        data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8) if size else torch.empty(0)
        self.tensors = {
            name: _tensor(data.untyped_storage()[start + first : start + last], spec)
            for name, (spec, first, last) in entries.items()
        }

    def check(self, tensor: Tensor, name: str) -> None:
        """Starts reading; there is nothing to compare with, as the format has no checksums."""
        fetch_pages(tensor)

    def blocks(self, tensor: Tensor, name: str, rows: int) -> Iterator[Tensor]:
        """Gives ``rows`` rows after the other; nothing is compared, as in ``check``."""
        self.check(tensor, name)
        yield from row_blocks(tensor, rows)


class SafetensorsWriter:
    """Writes a safetensors file tensor after tensor. Use as a context manager."""

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        """Starts the file; ``write`` must then be called for each of ``specs`` in order."""
        self._expected = ExpectedTensors(list(specs.values()))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, spec in specs.items():
            end = position + math.prod(spec.shape) * spec.dtype.itemsize
            header[name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
        self._file = open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._file.write(struct.pack("<Q", len(encoded)) + encoded)

    def write(self, *rows: Tensor) -> None:
        """Appends the next tensor, or its next rows: as ``TorchFileWriter.write``."""
        for part in rows:
            self._expected.take(part)
            self._file.write(tensor_bytes(part))

    def __enter__(self) -> SafetensorsWriter:
        """Starts the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Closes the file."""
        self._file.close()
        if error is None:
            self._expected.assert_complete()


def _entry(value: Mapping[str, Any]) -> tuple[TensorSpec, int, int]:
    first, last = value["data_offsets"]
    return TensorSpec(tuple(int(size) for size in value["shape"]), _DTYPES[value["dtype"]]), int(first), int(last)


def _tensor(storage: torch.UntypedStorage, spec: TensorSpec) -> Tensor:
    return torch.empty(0, dtype=spec.dtype).set_(storage).view(spec.shape)
