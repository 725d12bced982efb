"""Files of ``torch.save``, read and written one tensor at a time.

``torch.save`` needs the whole model in memory. The format allows better: a ZIP archive of uncompressed records, first a
small pickle that describes the nested structure, then the bytes of each tensor. Reading maps the file; writing appends
record after record. ``torch.load`` reads the result as it reads its own (PyTorch's notes on serialization describe it).
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from isal.isal_zlib import crc32  # checks and makes every byte's checksum: five to ten times zlib's speed
from torch import Tensor

from cosmos_mcore.checkpoint.files import fetch_pages

_ALIGNMENT = 64  # bytes; lets torch map tensors of any dtype
_LOCAL_HEADER = 30  # bytes of a ZIP record's header before its name
_ZIP64_EXTRA = 20  # bytes that zipfile adds to the header of a record that may pass 2 GiB
_PIECE = 2**20  # bytes that stay in the processor's cache between their checksum and their copy to the file
_STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True)
class TensorSpec:
    """Stands for a tensor in the structure given to ``TorchFileWriter``."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TorchFile:
    """A file of ``torch.save`` whose tensors are mapped from disk.

    Attributes:
        path: the file.
        content: what was saved; only plain containers, numbers, strings and tensors are accepted.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file; no tensor is read yet.

        Raises:
            ValueError: if it is not a complete file of ``torch.save``, or would run code.
        """
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                records = [info for info in archive.infolist() if re.fullmatch(r"[^/]+/data/\d+", info.filename)]
            self.content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(_unsafe(str(path), error)) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, KeyError, IndexError):
            raise ValueError(f"{path} is truncated or is not a file of torch.save; copy or download it again") from None
        # torch does not say which record a tensor came from; records and storages lie in the same order.
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in _tensors(self.content) if t.numel()}
        infos = sorted((info for info in records if info.file_size), key=lambda info: info.header_offset)
        self._unchecked = dict(zip(sorted(storages), infos, strict=False))
        if [storages[pointer].nbytes() for pointer in sorted(storages)] != [info.file_size for info in infos]:
            raise ValueError(f"{path} is corrupted: its tensors do not match its records; copy or download it again")

    def check(self, tensor: Tensor, name: str) -> None:
        """Compares the bytes of one of the file's tensors with their checksum, the first time it is asked for.

        Raises:
            ValueError: naming file and tensor, if they differ.
        """
        storage = tensor.untyped_storage()
        info = self._unchecked.pop(storage.data_ptr(), None)
        if info is None:
            return
        fetch_pages(tensor)
        if crc32(tensor_bytes(torch.empty(0, dtype=torch.uint8).set_(storage))) != info.CRC:
            raise ValueError(f"{self.path} is corrupted: {name} does not match its checksum; copy or download it again")


class TorchFileWriter:
    """Writes what ``torch.save(structure)`` would, tensor after tensor.

    Use as a context manager; the file is complete when the block ends.
    """

    def __init__(self, path: Path | _Inside, structure: Any) -> None:
        """Starts the file.

        Args:
            path: the file to write; or a place in an open one.
            structure: nested containers with a ``TensorSpec`` in the place of each tensor.
        """
        self._expected: list[TensorSpec] = []
        self._next = 0
        self._file: Any = path if isinstance(path, _Inside) else open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        pickled = io.BytesIO()
        pickler = _StructurePickler(pickled, self._expected)
        pickler.dump(structure)
        self._record("data.pkl", pickled.getvalue())
        self._record("byteorder", b"little")

    @classmethod
    def inside(cls, file: IO[bytes], tensor: Tensor) -> TorchFileWriter:
        """Starts an archive at the present place of an open file, for one tensor, which ``write`` is given next."""
        return cls(_Inside(file), TensorSpec(tuple(tensor.shape), tensor.dtype))

    def write(self, *rows: Tensor) -> None:
        """Appends the next tensor in the structure's order, whole or in pieces along its first axis."""
        check_rows(rows, self._expected[self._next])
        self._record(f"data/{self._next}", *map(tensor_bytes, rows))
        self._next += 1

    def __enter__(self) -> TorchFileWriter:
        """Starts the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finishes the file, or closes it as it is after an error."""
        try:
            if error is None:
                assert self._next == len(self._expected), "tensors are missing"
                self._record("version", b"3\n")
                self._archive.close()
        finally:
            self._archive.fp = None  # or it would try to finish the file once more
            self._file.close()

    def _record(self, name: str, *data: Any) -> None:
        info = zipfile.ZipInfo("archive/" + name)  # its fixed default date makes equal files equal
        info.file_size = info.compress_size = sum(memoryview(part).nbytes for part in data)
        info.header_offset, info.CRC = self._file.tell(), 0
        info.external_attr = 0o600 << 16  # what unzip gives the files that it makes
        large = info.file_size > zipfile.ZIP64_LIMIT
        header = _LOCAL_HEADER + len(info.filename) + (_ZIP64_EXTRA if large else 0)
        padding = -(info.header_offset + header + 4) % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch pads
        # Not with ``ZipFile.open``, which would compute the checksum with zlib; the last lines are ``ZipFile.mkdir``'s.
        self._file.write(info.FileHeader(large))
        for part in data:
            view = memoryview(part)
            for start in range(0, view.nbytes, _PIECE):
                piece = view[start : start + _PIECE]
                info.CRC = crc32(piece, info.CRC)
                self._file.write(piece)
        end = self._file.tell()
        self._file.seek(info.header_offset)
        self._file.write(info.FileHeader(large))
        self._file.seek(end)
        self._archive.filelist.append(info)
        self._archive.NameToInfo[info.filename] = info
        self._archive.start_dir = end


class _Inside:
    """A file that begins at the present place of another one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._start = file, file.tell()
        self.write, self.flush = file.write, file.flush

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + (self._start if whence == 0 else 0), whence) - self._start

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """The other file stays open."""


class _Storage:
    """One tensor's bytes in the pickle; written as a persistent reference to record ``data/{key}``."""

    def __init__(self, spec: TensorSpec, key: int) -> None:
        self.reference = ("storage", _STORAGES[spec.dtype], str(key), "cpu", _numel(spec.shape))


class _StructurePickler(pickle.Pickler):
    """Pickles a structure with ``TensorSpec`` leaves as torch pickles tensors."""

    def __init__(self, file: io.BytesIO, expected: list[TensorSpec]) -> None:
        super().__init__(file, protocol=2)
        self.fast = True  # no memo: two places with the same spec are two tensors
        self._expected = expected

    def persistent_id(self, obj: Any) -> Any:
        return obj.reference if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, TensorSpec):
            return NotImplemented
        storage = _Storage(obj, len(self._expected))
        self._expected.append(obj)
        strides = torch.empty(obj.shape, device="meta").stride()
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        return torch._utils._rebuild_tensor_v2, (storage, 0, obj.shape, strides, False, hooks)


def load_bytes(data: bytes, where: str) -> Any:
    """Reads a small ``torch.save`` archive that lies inside another file, checksums included.

    Raises:
        ValueError: if the bytes are damaged or would run code.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_unsafe(where, error)) from None
    except (zipfile.BadZipFile, RuntimeError, EOFError):
        pass
    raise ValueError(f"{where} is corrupted: it does not match its checksum; copy it again")


def _unsafe(where: str, error: Exception) -> str:
    found = re.search(r"(?:GLOBAL|Unsupported global:|class) ([\w.]+)", str(error))
    what = f" ({found.group(1)})" if found else ""
    return f"{where} is refused: it holds Python objects{what} that could run code; only plain tensors are read"


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from _tensors(value)


def check_rows(rows: Sequence[Tensor], spec: TensorSpec) -> None:
    """Asserts that tensors make up ``spec`` along the first axis."""
    joined = (sum(row.size(0) for row in rows), *rows[0].shape[1:]) if rows[0].dim() else ()
    fits = all(row.dtype == spec.dtype and row.shape[1:] == spec.shape[1:] for row in rows)
    assert joined == spec.shape and fits, f"expected {spec}"


def tensor_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as a buffer; a copy only if it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
