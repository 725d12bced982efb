"""Reads the weights of a TorchScript file without running anything in it.

Such a file is a ZIP archive: ``data.pkl`` describes the tree of modules, ``data/N`` holds the bytes of its tensors, and
the rest is code. The description is a pickle, but only numbers, containers, tensors and bare modules are taken from it.
"""

from __future__ import annotations

import collections
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_jit_weights(path: Path) -> dict[str, Tensor]:
    """Reads all tensors of a file of ``torch.jit.save``, with the names that its ``state_dict`` would have.

    Constants that were traced into modules as buffers are among them; those in the code are not.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but modules and tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(
                (n[: -len("data.pkl")] for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n)), None
            )
            if root is None or f"{root}constants.pkl" not in archive.namelist():
                raise ValueError(f"{path} is not a TorchScript file; download it again")
            with archive.open(f"{root}data.pkl") as file:
                tree = _TreeReader(file, archive, root, path).load()
            return dict(_named_tensors(tree, ""))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}; tokenizer.path must be the folder that has it") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        UnicodeDecodeError,
        pickle.UnpicklingError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        RuntimeError,
    ) as error:
        raise ValueError(f"{path} is damaged ({error}); download it again") from None


class _Module:
    """A module of the file: its attributes, without its code."""


class _TreeReader(pickle.Unpickler):
    """An unpickler to which only plain data and tensors exist."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        super().__init__(file)
        self.archive, self.root, self.path = archive, root, path

    def find_class(self, module: str, name: str) -> Any:
        """Gives our own stand-in for what the pickle names; refuses all else."""
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if module == "torch.jit._pickle":  # lists with a declared type
            return lambda data, *_: data
        if (module, name) not in known:
            raise ValueError(f"{self.path} is refused: it names {module}.{name}, which could run code")
        return known[module, name]

    def persistent_load(self, reference: Any) -> Tensor:
        """Reads the bytes of one storage, checksum included."""
        _, dtype, key, _, count = reference
        data = bytearray(self.archive.read(f"{self.root}data/{key}"))
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"{self.path} is damaged (record {key} has {len(data)} bytes); download it again")
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)  # refuses what lies outside the storage


def _named_tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _named_tensors(value, f"{prefix}{name}.")
