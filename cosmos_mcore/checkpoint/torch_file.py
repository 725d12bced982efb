"""Files of ``torch.save``, read and written one tensor at a time.

``torch.save`` needs the whole model in memory. The format allows better: a ZIP archive of uncompressed records, first a
small pickle that describes the nested structure, then the bytes of each tensor. Reading maps the file; writing appends
record after record. ``torch.load`` reads the result as it reads its own (PyTorch's notes on serialization describe it).
"""

from __future__ import annotations

import collections
import io
import lzma
import pickle
import re
import struct
import zipfile
import zlib
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
_BLOCK = 2**21  # bytes that stay there from one thread that checks them to another that writes them
# What reading a damaged archive raises: damage can make a record look encrypted, or compressed in any way.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, NotImplementedError, RuntimeError)
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
                records = []
                for info in archive.infolist():
                    if re.fullmatch(r"[^/]+/data/\d+", info.filename):
                        records.append(info)
                    elif info.compress_type != zipfile.ZIP_STORED:
                        raise zipfile.BadZipFile
                    else:
                        archive.read(info)  # compares the checksum, as torch does not: of names, shapes and numbers
            self.content: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(_unsafe(str(path), error)) from None
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
        except (*DAMAGE, ValueError, KeyError, IndexError):
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
        if storage.data_ptr() in self._unchecked:
            fetch_pages(tensor)
            self._compare(tensor, name, crc32(tensor_bytes(torch.empty(0, dtype=torch.uint8).set_(storage))))

    def blocks(self, tensor: Tensor, name: str, rows: int) -> Iterator[Tensor]:
        """As ``check``, but a few rows at a time: the last ones have been given when a difference is found.

        Yields:
            Views of ``rows`` rows (the last one: up to that many). Read them all: there is no check before the end.

        Raises:
            ValueError: naming file and tensor, if its bytes do not match their checksum.
        """
        storage = tensor.untyped_storage()
        if tensor.nbytes != storage.nbytes() or not tensor.is_contiguous():
            self.check(tensor, name)
        if storage.data_ptr() not in self._unchecked:
            yield from row_blocks(tensor, rows)
            return
        fetch_pages(tensor)
        checksum = 0
        for block in row_blocks(tensor, rows):
            checksum = crc32(tensor_bytes(block), checksum)
            yield block
        self._compare(tensor, name, checksum)

    def _compare(self, tensor: Tensor, name: str, checksum: int) -> None:
        pointer = tensor.untyped_storage().data_ptr()
        if checksum != self._unchecked[pointer].CRC:
            raise ValueError(f"{self.path} is corrupted: {name} does not match its checksum; copy or download it again")
        del self._unchecked[pointer]


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
        expected: list[TensorSpec] = []
        self._file: Any = path if isinstance(path, _Inside) else open(path, "wb")  # noqa: SIM115 - closed by __exit__
        self._archive = zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED)
        try:
            pickled = io.BytesIO()
            _StructurePickler(pickled, expected).dump(structure)
            self._expected = ExpectedTensors(expected)
            self._record("data.pkl", pickled.getvalue())
            self._record("byteorder", b"little")
        except BaseException:
            self._release()
            raise

    @classmethod
    def inside(cls, file: IO[bytes], tensor: Tensor) -> TorchFileWriter:
        """Starts an archive at the present place of an open file, for one tensor, which ``write`` is given next."""
        return cls(_Inside(file), TensorSpec(tuple(tensor.shape), tensor.dtype))

    def write(self, *rows: Tensor) -> None:
        """Appends the next tensor in the structure's order, or its next rows.

        Args:
            rows: pieces that follow each other along the first axis; the rest may come with the next calls.
        """
        for part in rows:
            if not self._expected.started:
                self._open(f"data/{self._expected.index}", _num_bytes(self._expected.spec))
            full = self._expected.take(part)
            self._append(tensor_bytes(part))
            if full:
                self._close()

    def __enter__(self) -> TorchFileWriter:
        """Starts the block."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Finishes the file, or closes it as it is after an error."""
        try:
            if error is None:
                self._expected.assert_complete()
                self._record("version", b"3\n")
                self._archive.close()
        finally:
            self._release()

    def _release(self) -> None:
        self._archive.fp = None  # or it would try to finish the file once more
        self._file.close()

    def _record(self, name: str, data: bytes) -> None:
        self._open(name, len(data))
        self._append(data)
        self._close()

    def _open(self, name: str, size: int) -> None:
        """Starts a record of so many bytes."""
        info = zipfile.ZipInfo("archive/" + name)  # its fixed default date makes equal files equal
        info.file_size = info.compress_size = size
        info.header_offset, info.CRC = self._file.tell(), 0
        info.external_attr = 0o600 << 16  # what unzip gives the files that it makes
        large = info.file_size > zipfile.ZIP64_LIMIT
        header = _LOCAL_HEADER + len(info.filename) + (_ZIP64_EXTRA if large else 0)
        padding = -(info.header_offset + header + 4) % _ALIGNMENT
        info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding  # as torch pads
        # Not with ``ZipFile.open``, which would compute the checksum with zlib.
        self._file.write(info.FileHeader(large))
        self._info = info

    def _append(self, data: Any) -> None:
        """Adds bytes to the open record."""
        view = memoryview(data)
        for start in range(0, view.nbytes, _PIECE):
            piece = view[start : start + _PIECE]
            self._info.CRC = crc32(piece, self._info.CRC)
            self._file.write(piece)

    def _close(self) -> None:
        """Ends the open record, as ``ZipFile.mkdir`` does."""
        info, end = self._info, self._file.tell()
        self._file.seek(info.header_offset)
        self._file.write(info.FileHeader(info.file_size > zipfile.ZIP64_LIMIT))
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
    except DAMAGE:
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


class ExpectedTensors:
    """Which tensor a file gets next, and how much of it is there: asserts that all come in order, with all their rows.

    Attributes:
        index: of the tensor that is due.
        started: whether rows of it have been taken.
    """

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        """Expects all of ``specs``."""
        self._specs, self.index, self.started, self._rows = specs, 0, False, 0

    @property
    def spec(self) -> TensorSpec:
        """The tensor that is due."""
        return self._specs[self.index]

    def take(self, rows: Tensor) -> bool:
        """Notes the next rows along the first axis (or all of a scalar); returns whether they complete the tensor."""
        spec = self.spec
        assert rows.dtype == spec.dtype and rows.dim() == len(spec.shape), f"expected {spec}"
        assert rows.shape[1:] == spec.shape[1:], f"expected {spec}"
        self.started, self._rows = True, self._rows + (rows.size(0) if spec.shape else 1)
        missing = (spec.shape[0] if spec.shape else 1) - self._rows
        assert missing >= 0, f"more rows than {spec}"
        if missing == 0:
            self.index, self.started, self._rows = self.index + 1, False, 0
        return missing == 0

    def assert_complete(self) -> None:
        """Asserts that nothing is missing."""
        assert self.index == len(self._specs), "tensors are missing"


def block_rows(tensor: Tensor, parts: int = 1) -> int:
    """How many rows of a tensor, in each of ``parts`` that lie side by side, make a block that stays in the cache."""
    row = tensor.nbytes // tensor.size(0) if tensor.dim() and tensor.size(0) else 0
    return max(1, _BLOCK // max(1, row * parts))


def row_blocks(tensor: Tensor, rows: int) -> Sequence[Tensor]:
    """Cuts a tensor in views of so many rows along its first axis; a scalar stays whole."""
    return tensor.split(rows) if tensor.dim() else (tensor,)


def tensor_bytes(tensor: Tensor) -> Any:
    """The tensor's bytes as a buffer; a copy only if it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _num_bytes(spec: TensorSpec) -> int:
    return _numel(spec.shape) * spec.dtype.itemsize
