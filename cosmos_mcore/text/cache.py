"""Embeddings of prompts on disk, so that each prompt is encoded once and training needs no text encoder.

One folder belongs to one encoder, which ``embeddings.json`` names. Each prompt has a file of its own, found by the hash
of its text, with the rows that are not zero. Any number of processes may use a folder. Imports no torch until
embeddings are read or made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from cosmos_mcore.config.derived import TEXT_LENGTH, TEXT_WIDTH

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos_mcore.text.encoder import TextEncoder

_SETTINGS = "embeddings.json"
_ENCODER, _TENSOR = "encoder", "embedding"
BATCH = 16  # prompts that are encoded at once
_LOOK_THREADS, _LOOK_AT_ONCE = 32, 200  # for files: over a network each look takes a while


class EmbeddingCache:
    """The embeddings in one folder; thread-safe.

    Args:
        folder: where they lie; is made when the first one is kept.
        fingerprint: of the encoder, where its files are at hand; embeddings of another one are refused then.

    Raises:
        ValueError: if the folder's embeddings are another encoder's.
    """

    def __init__(self, folder: Path, fingerprint: str | None = None) -> None:
        self.folder = folder
        self._encoder = self._read_encoder()
        if fingerprint is not None and self._encoder is not None:
            self._check_encoder(fingerprint)

    def __contains__(self, prompt: str) -> bool:
        """Whether there is an embedding; it is not read."""
        return self._path(prompt).is_file()

    def missing(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts without an embedding, each once, in their order."""
        distinct = list(dict.fromkeys(prompts))
        parts = [distinct[first : first + _LOOK_AT_ONCE] for first in range(0, len(distinct), _LOOK_AT_ONCE)]
        with ThreadPoolExecutor(_LOOK_THREADS, thread_name_prefix="embeddings") as pool:
            lacking = pool.map(lambda part: [prompt for prompt in part if prompt not in self], parts)
            return [prompt for part in lacking for prompt in part]

    def read(self, prompt: str) -> Tensor | None:
        """The embedding [TEXT_LENGTH, TEXT_WIDTH] bf16 of a prompt, zeros behind its last token.

        None if there is none. A damaged one counts as none, and is removed, so that it will be made again.

        Raises:
            ValueError: if the file system does not let it be read, or the folder does not say whose embeddings it has.
        """
        import torch

        path = self._path(prompt)
        try:
            with safe_open(path, framework="pt") as file:
                notes, rows = file.metadata() or {}, file.get_tensor(_TENSOR)
        except FileNotFoundError:
            return None
        except SafetensorError:
            _remove(path)
            return None
        except OSError as error:
            raise ValueError(f"the embedding {path} cannot be read ({error})") from None
        good = rows.dtype == torch.bfloat16 and rows.dim() == 2 and rows.size(1) == TEXT_WIDTH
        if not (good and len(rows) <= TEXT_LENGTH and notes == self._notes(prompt, rows)):
            _remove(path)
            return None
        embedding = torch.zeros(TEXT_LENGTH, TEXT_WIDTH, dtype=torch.bfloat16)
        embedding[: len(rows)] = rows
        return embedding

    def add(self, prompts: Sequence[str], encoder: TextEncoder) -> Tensor:
        """Encodes prompts, in one batch, and keeps their embeddings.

        Returns:
            [B, TEXT_LENGTH, TEXT_WIDTH] bf16, on the CPU.

        Raises:
            ValueError: if the folder cannot be written, or its embeddings are another encoder's.
        """
        import torch

        self._adopt(encoder.fingerprint)
        embeddings = encoder(prompts).to("cpu", torch.bfloat16)
        if not embeddings.isfinite().all():
            raise ValueError("the text encoder gives numbers that are not finite; its weights are damaged")
        for prompt, embedding in zip(prompts, embeddings, strict=True):
            length = int(embedding.any(dim=1).nonzero().max()) + 1
            self._write(prompt, embedding[:length].clone())
        return embeddings

    def embed(self, prompts: Sequence[str], make_encoder: Callable[[], TextEncoder]) -> Tensor:
        """The embeddings of prompts; those that are missing are made and kept.

        Args:
            prompts: any number, repeated ones too.
            make_encoder: loads the encoder; called only if an embedding is missing.

        Returns:
            [B, TEXT_LENGTH, TEXT_WIDTH] bf16, on the CPU.

        Raises:
            ValueError: if the folder cannot be written, or its embeddings are another encoder's.
        """
        import torch

        found = {prompt: self.read(prompt) for prompt in prompts}
        missing = [prompt for prompt, embedding in found.items() if embedding is None]
        if missing:
            encoder = make_encoder()
            for first in range(0, len(missing), BATCH):
                batch = missing[first : first + BATCH]
                found.update(zip(batch, self.add(batch, encoder), strict=True))
        return torch.stack([embedding for prompt in prompts if (embedding := found[prompt]) is not None])

    def _path(self, prompt: str) -> Path:
        name = hashlib.sha256(prompt.encode()).hexdigest()[:32]
        return self.folder / name[:2] / f"{name}.safetensors"

    def _notes(self, prompt: str, rows: Tensor) -> dict[str, str]:
        """What a file says beside the tensor, checksum included, which safetensors files do not have."""
        import torch

        if self._encoder is None:
            self._encoder = self._read_encoder()  # another process may have begun the folder meanwhile
        if self._encoder is None:
            raise ValueError(
                f"{self.folder} has embeddings but no {_SETTINGS}, which says whose they are; copy that file, too, or "
                "name another folder"
            )
        checksum = zlib.crc32(rows.contiguous().view(torch.uint8).numpy().data)
        return {"prompt": prompt, _ENCODER: self._encoder, "crc32": f"{checksum:08x}"}

    def _write(self, prompt: str, rows: Tensor) -> None:
        from safetensors.torch import save

        data = save({_TENSOR: rows}, self._notes(prompt, rows))
        self._replace(self._path(prompt), data)

    def _adopt(self, fingerprint: str) -> None:
        """Makes the folder the encoder's, or sees that it is."""
        if self._encoder is None:
            self._encoder = self._read_encoder()
        if self._encoder is None:
            settings = {_ENCODER: fingerprint, "length": TEXT_LENGTH, "width": TEXT_WIDTH}
            self._replace(self.folder / _SETTINGS, json.dumps(settings, indent=1).encode() + b"\n")
            self._encoder = self._read_encoder()
        self._check_encoder(fingerprint)

    def _read_encoder(self) -> str | None:
        path = self.folder / _SETTINGS
        try:
            return str(json.loads(path.read_text())[_ENCODER])
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror or error}); name another folder") from None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path} is damaged; delete the folder {self.folder}") from None

    def _check_encoder(self, fingerprint: str) -> None:
        if self._encoder != fingerprint:
            raise ValueError(
                f"the embeddings in {self.folder} were made by another text encoder; name another folder, or delete it"
            )

    def _replace(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.incomplete")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            _remove(temporary)
            raise ValueError(
                f"the folder of embeddings {self.folder} cannot be written ({error.strerror or error}); "
                "name another one, or make room"
            ) from None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # gone already, or a folder that may only be read
        path.unlink()
