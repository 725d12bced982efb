"""Downloads from the Hugging Face hub: they resume, and known digests are checked in a streaming read."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cosmos_mcore.checkpoint.files import flush

logger = logging.getLogger(__name__)

_BLOCK = 2**24  # bytes read at a time
# Errors of the disk, among those of the network.
_OF_THE_DISK = (errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.ENOSPC, errno.ENOTDIR, errno.EROFS)


@dataclass(frozen=True)
class Repository:
    """What to take from one repository of the hub.

    Attributes:
        repo_id: ``owner/name``.
        folder: where its files go, relative to the folder of all.
        patterns: files to take; a trailing ``/*`` takes a folder with all below.
        md5: known digests by path in the repository; these files must be there.
        repo_type: ``model`` or ``dataset``.
    """

    repo_id: str
    folder: str
    patterns: tuple[str, ...] = ("*",)
    md5: Mapping[str, str] = field(default_factory=dict)
    repo_type: str = "model"


def require_hub() -> Any:
    """The ``huggingface_hub`` package; raises ValueError if it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise ValueError("huggingface_hub is not installed; install the hub extra: pip install '.[hub]'") from None
    return huggingface_hub


def download(repository: Repository, root: Path) -> Path:
    """Brings a repository's files to ``root / repository.folder``.

    Complete files are left alone; an interrupted download goes on where it stopped. Files in the hub's own cache are
    copied from there, which is all that happens with ``HF_HUB_OFFLINE=1``. A file appears under its name only when its
    size, and its MD5 where it is known, are right.

    Returns:
        The folder.

    Raises:
        ValueError: one line: what cannot be reached or read, what to do, or which file has a wrong digest.
    """
    folder = root / repository.folder
    if repository.md5 and all((folder / name).is_file() for name in repository.md5):
        for name, digest in repository.md5.items():
            _check_existing(folder / name, digest)
        logger.info("%s is complete", folder)
        return folder
    hub = require_hub()
    with _one_line(repository, folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            info = hub.HfApi().repo_info(repository.repo_id, repo_type=repository.repo_type, files_metadata=True)
        except hub.errors.OfflineModeIsEnabled:
            _copy_cached(repository, folder)
        else:
            names = [sibling.rfilename for sibling in info.siblings]
            for name in _wanted(names, repository):
                _bring(repository, name, info.sha, folder / name)
    missing = next((name for name in repository.md5 if not (folder / name).is_file()), None)
    if missing is not None:
        raise ValueError(f"{repository.repo_id} has no {missing}, so {folder} is not complete")
    return folder


def _wanted(names: Sequence[str], repository: Repository) -> list[str]:
    """The files to take; those with known digests last, since a folder that has them counts as complete."""
    wanted = [
        name
        for name in names
        if any(fnmatch.fnmatch(name, pattern) for pattern in repository.patterns)
        and not os.path.isabs(name)
        and ".." not in Path(name).parts
    ]
    return sorted(wanted, key=lambda name: name in repository.md5)


def _bring(repository: Repository, name: str, revision: str, path: Path) -> None:
    hub = require_hub()
    digest = repository.md5.get(name)
    if path.is_file():
        if digest is not None:
            _check_existing(path, digest)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    cached = hub.try_to_load_from_cache(repository.repo_id, name, revision=revision, repo_type=repository.repo_type)
    if isinstance(cached, str):
        _copy(Path(cached), path, digest)
        return
    url = hub.hf_hub_url(repository.repo_id, name, repo_type=repository.repo_type, revision=revision)
    metadata = hub.get_hf_file_metadata(url)
    # The version is part of the name, so that bytes of two versions never meet.
    partial = path.with_name(f"{path.name}.{metadata.etag[:16]}.incomplete")
    with open(partial, "ab") as file:
        hub.file_download.http_get(
            url,
            file,
            resume_size=file.tell(),
            expected_size=metadata.size,
            headers=hub.utils.build_hf_headers(),
            displayed_filename=name,
        )
    _finish(partial, path, digest)


def _copy_cached(repository: Repository, folder: Path) -> None:
    """Takes a repository from the hub's cache on this machine."""
    hub = require_hub()
    patterns = list(repository.patterns)
    snapshot = Path(
        hub.snapshot_download(
            repository.repo_id, repo_type=repository.repo_type, allow_patterns=patterns, local_files_only=True
        )
    )
    names = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
    for name in _wanted(names, repository):
        if not (folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy(snapshot / name, folder / name, repository.md5.get(name))


def _copy(source: Path, path: Path, digest: str | None) -> None:
    partial = path.with_name(path.name + ".incomplete")
    shutil.copyfile(source, partial)
    _finish(partial, path, digest)


def _finish(partial: Path, path: Path, digest: str | None) -> None:
    """Moves a downloaded file to its name if it is what it should be."""
    if digest is not None and md5(partial) != digest:
        partial.unlink()
        raise ValueError(f"{path} was damaged on its way (MD5 differs) and has been removed; run the command again")
    flush(partial)
    os.replace(partial, path)


def _check_existing(path: Path, digest: str) -> None:
    if md5(path) != digest:
        raise ValueError(f"{path} is not the released file (MD5 differs); move it away and run the command again")


def md5(path: Path) -> str:
    """MD5 of a file, read in blocks, with a progress bar on a terminal."""
    digest = hashlib.md5(usedforsecurity=False)
    with (
        open(path, "rb") as file,
        tqdm(total=path.stat().st_size, desc=f"checking {path.name}", unit="B", unit_scale=True, disable=None) as bar,
    ):
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


@contextmanager
def _one_line(repository: Repository, folder: Path) -> Iterator[None]:
    """Turns the hub's errors into a sentence that says what to do. Never shows headers, which hold the token."""
    hub = require_hub()
    errors, endpoint, repo_id = hub.errors, hub.constants.ENDPOINT, repository.repo_id
    try:
        yield
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise ValueError(
            f"{repo_id} cannot be read with this account: 1. accept its terms at {endpoint}/{repo_id}  "
            f"2. make a token with read access at {endpoint}/settings/tokens  "
            "3. log in with `hf auth login` or set HF_TOKEN; then run the same command again"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ValueError(
            f"{repo_id} is not complete in the hub's cache on this machine, and HF_HUB_OFFLINE forbids to download it; "
            "unset HF_HUB_OFFLINE, or copy the cache of another machine (HF_HOME)"
        ) from None
    except (OSError, *errors.HfHubHTTPError.__bases__) as error:
        logger.debug("download failed", exc_info=True)
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise ValueError(f"{folder} cannot be written: {error.strerror}") from None
        raise ValueError(
            f"{repo_id} could not be downloaded from {endpoint} ({type(error).__name__}); run the same command again: "
            "it goes on where it stopped"
        ) from None
