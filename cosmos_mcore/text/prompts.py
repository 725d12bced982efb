"""What videos show, in words: a ``.txt`` beside each of them, or one file for all. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from cosmos_mcore.config.derived import user_path

_READ_THREADS = 32


@dataclass(frozen=True)
class Prompts:
    """What ``find_prompts`` found.

    Attributes:
        by_path: the prompt of each video that has one.
        missing: why each of the other videos has none.
    """

    by_path: dict[str, str]
    missing: dict[str, str]


def find_prompts(paths: Sequence[str], source: str | None) -> Prompts:
    """Finds the prompts of videos.

    Args:
        paths: the videos; they need not exist (any more).
        source: a file with ``{"visual_input": PATH, "prompt": TEXT}`` on each line, paths relative to its folder,
            which may name other videos, too; None: the text file beside each video, ``clip.txt`` for ``clip.mp4``.

    Raises:
        ValueError: if the file cannot be read, or not one video has a prompt.
    """
    found = _beside(paths) if source is None else _from_file(paths, user_path(source))
    if paths and not found.by_path:
        hint = "put a .txt with a prompt beside each video, or name a JSONL file in data.prompts"
        if source is not None:
            hint = 'each line must name one as {"visual_input": PATH, "prompt": TEXT}, PATH relative to the file'
        raise ValueError(
            f"none of the {len(paths)} videos has a prompt; the first, {paths[0]}, {found.missing[paths[0]]}; {hint}"
        )
    return found


def _beside(paths: Sequence[str]) -> Prompts:
    with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="prompts") as pool:
        results = list(pool.map(_read_beside, paths))
    by_path = {path: text for path, (text, _) in zip(paths, results, strict=True) if text}
    return Prompts(by_path, {path: why for path, (text, why) in zip(paths, results, strict=True) if not text})


def _read_beside(path: str) -> tuple[str, str]:
    """The prompt, or an empty one and why."""
    file = Path(path).with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig").strip(), f"has an empty prompt ({file})"
    except FileNotFoundError:
        return "", f"has no prompt ({file} does not exist)"
    except OSError as error:
        return "", f"has no prompt ({file} cannot be read: {error.strerror or error})"
    except UnicodeDecodeError:
        return "", f"has no prompt ({file} is not UTF-8 text)"


def _from_file(paths: Sequence[str], file: Path) -> Prompts:
    real_folder = lru_cache(maxsize=None)(os.path.realpath)

    def place(path: str | Path) -> str:
        """The same for every way to a video through links to folders; a link to a file keeps its name."""
        folder, name = os.path.split(os.path.abspath(path))
        return os.path.join(real_folder(folder), name)

    prompts: dict[str, str] = {}
    for number, path, text in _lines(file):
        name = place(file.parent / path)
        if name in prompts:
            raise ValueError(f"data.prompts={file}, line {number}: {path} has a prompt already; keep one line of it")
        prompts[name] = text
    found = {path: prompts.get(place(path)) for path in paths}
    missing = {
        path: f"has {'no' if text is None else 'an empty'} prompt in {file}" for path, text in found.items() if not text
    }
    return Prompts({path: text for path, text in found.items() if text}, missing)


def _lines(file: Path) -> Iterator[tuple[int, str, str]]:
    """Number from 1, path and prompt of each line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(
            f"data.prompts={file} cannot be read ({error.strerror or error}); name a JSONL file, or null for a .txt "
            "beside each video"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"data.prompts={file} is not UTF-8 text; save it as such") from None
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            path, prompt = entry["visual_input"], entry["prompt"]
            good = isinstance(path, str) and isinstance(prompt, str) and prompt.encode() is not None
        except (ValueError, KeyError, TypeError):  # half a character, which JSON can hold, is a ValueError, too
            good = False
        if not good:
            raise ValueError(
                f'data.prompts={file}, line {number}: must be {{"visual_input": PATH, "prompt": TEXT}}, not {line[:80]}'
            )
        yield number, path, prompt.strip()
