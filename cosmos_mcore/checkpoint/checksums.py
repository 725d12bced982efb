"""Whether the bytes of a distributed checkpoint are those that were written.

PyTorch's reader does not compare checksums, so a damaged disk would go on training with wrong weights.
"""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cosmos_mcore.checkpoint.distributed_reader import COMMON, OPTIMIZER, read_metadata
from cosmos_mcore.checkpoint.torch_file import DAMAGE

_THREADS = 4  # each holds one stored tensor in memory
_PIECE = 2**22  # bytes


def check_checksums(path: Path, rank: int = 0, ranks: int = 1, weights_only: bool = False) -> None:
    """Reads the share of one of several ranks and compares the checksums.

    Args:
        path: the checkpoint.
        rank: whose share; each rank reads other files.
        ranks: how many share the work.
        weights_only: leave out what the optimizer keeps.

    Raises:
        ValueError: if something is missing or differs.
    """
    files: dict[str, list[Any]] = defaultdict(list)
    for index, info in read_metadata(path).storage_data.items():
        if weights_only and index.fqn.startswith(OPTIMIZER):
            continue
        files[Path(info.relative_path).name].append(info)
    if rank == 0 and (path / COMMON).is_file():
        check_archive((path / COMMON).read_bytes(), path / COMMON)
    pieces = [(path / name, info) for name in sorted(files)[rank::ranks] for info in files[name]]
    with ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(lambda piece: _check(*piece), pieces):
            pass


def _check(file: Path, info: Any) -> None:
    try:
        with open(file, "rb") as opened:
            opened.seek(info.offset)
            data = opened.read(info.length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    if len(data) < info.length:
        raise ValueError(f"{file} is truncated")
    check_archive(data, file)


def check_archive(data: bytes, file: Path) -> None:
    """Compares all checksums of an archive of ``torch.save`` in memory.

    Raises:
        ValueError: naming ``file``, if it is damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in archive.namelist():
                with archive.open(name) as record:  # raises at its end if the checksum differs
                    while record.read(_PIECE):
                        pass
    except DAMAGE:
        raise ValueError(f"{file} is damaged: its bytes do not match their checksum") from None
