"""Fills a token cache before training: any number of processes, in any order, as often as it takes."""

from __future__ import annotations

import argparse
import json
import logging
import os
import secrets
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from cosmos_mcore.config import RunConfig
from cosmos_mcore.config.derived import user_path
from cosmos_mcore.config.validate import validate
from cosmos_mcore.data.contents import FileContents
from cosmos_mcore.data.index import Clip, ClipIndex, SkippedFile, index_clips
from cosmos_mcore.data.mp4 import UnreadableVideoError
from cosmos_mcore.data.token_cache import cached_keys, is_cache, merge, writing_to
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.parts import device_of, progress_bar, read_arguments

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"


@dataclass
class Outcome:
    """What one process has done: clips that were new, clips that were there, and what could not be read."""

    made: int = 0
    found: int = 0
    dropped: dict[str, SkippedFile] = field(default_factory=dict)


def main(arguments: list[str]) -> int:
    """Tokenizes as the command line says.

    Returns:
        The exit code.

    Raises:
        ValueError: for a user's mistake.
    """
    parser = argparse.ArgumentParser(
        description="Tokenize a config's clips into a token cache, which data.token_cache (or data.path, without the "
        "videos) then names. Run as many processes as you like, with torchrun or with --part; run again to go on."
    )
    parser.add_argument("--output", type=Path, help="the token cache; default: data.token_cache of the config")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="token caches to copy into the output first")
    args, config, part = read_arguments(parser, arguments)
    if args.output is not None:
        config.data.token_cache = str(args.output)
    if config.data.token_cache in (None, "auto"):
        raise ValueError("there is no folder for the token cache; give --output FOLDER, or set data.token_cache")
    validate(config)
    configure_logging()
    folder = user_path(str(config.data.token_cache))
    for source in args.merge:
        logger.info("copied %d files of %s", merge(source, folder), source)
    if is_cache(config.data.path):
        raise ValueError(f"data.path={config.data.path} is a token cache already; name the videos")
    index = index_clips(config.data)
    outcome = fill(config, index, part)
    with writing_to(folder):
        note_dropped(folder, part, list(outcome.dropped.values()))
        kept, missing = write_manifest(folder, index)
    logger.info(
        "part %d of %d: %d clips tokenized, %d were there, %d files dropped; the cache has %d of %d clips: %s",
        *(part[0], part[1], outcome.made, outcome.found, len(outcome.dropped), kept, kept + missing, folder / MANIFEST),
    )
    return 0


def fill(config: RunConfig, index: ClipIndex, part: tuple[int, int]) -> Outcome:
    """Tokenizes a part of the clips that the cache does not have yet.

    Args:
        config: ``data.token_cache`` names the cache.
        index: the clips.
        part: (which, of how many); 0 based.

    Raises:
        ValueError: if the cache was made with other settings, or its disk is full, or the tokenizer's files are wrong.
    """
    from cosmos_mcore.data.clip_tokens import build_clip_tokens
    from cosmos_mcore.tokenizer.build import build_tokenizer

    device = device_of(part)
    tokens = build_clip_tokens(config, build_tokenizer(config, device), device)
    assert tokens.cache is not None
    outcome = Outcome()
    outcome.dropped = {file.path: file for file in index.skipped} if part[0] == 0 else {}
    # Contiguous parts: a file is hashed by one process, seldom by two.
    numbers = range(len(index.clips) * part[0] // part[1], len(index.clips) * (part[0] + 1) // part[1])
    bar = progress_bar(len(numbers), "clip", part)
    threads = max(config.data.num_workers, tokens.parallel_clips)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="clip") as pool:
            for clip, result in _in_order(pool, tokens.ids, (index.clips[number] for number in numbers), 4 * threads):
                try:
                    result.result()
                except UnreadableVideoError as error:
                    if clip.path not in outcome.dropped:
                        outcome.dropped[clip.path] = SkippedFile(clip.path, str(error))
                        logger.warning("dropped %s: %s", clip.path, error)
                if not tokens.cache.takes_more:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise ValueError(
                        f"{tokens.cache.folder} takes no more ids; make room and run the same command again"
                    )
                bar.update()
        outcome.made, outcome.found = tokens.cache.added, tokens.cache.hits
    finally:
        bar.close()
        tokens.close()
    return outcome


def note_dropped(folder: Path, part: tuple[int, int], files: list[SkippedFile]) -> None:
    """Leaves what one part has dropped for the manifest, in the place of what it has dropped before."""
    for path in folder.glob("dropped-*.json"):
        if not path.name.endswith(f"of{part[1]}.json"):  # of an earlier run, cut into other parts
            path.unlink(missing_ok=True)
    path = folder / f"dropped-{part[0]}of{part[1]}.json"
    temporary = path.with_suffix(".incomplete")
    temporary.write_text(json.dumps({file.path: file.reason for file in files}, indent=1))
    os.replace(temporary, path)


def write_manifest(folder: Path, index: ClipIndex) -> tuple[int, int]:
    """Lists, as one JSON object per line, every clip that the cache has and every file that was dropped.

    The last of several processes to end writes the complete one.

    Returns:
        How many clips the cache has, and how many it lacks.
    """
    contents = FileContents(folder).paths()
    present = set(cached_keys(folder))
    reasons = {file.path: file.reason for file in index.skipped}
    for notes in sorted(folder.glob("dropped-*.json")):
        reasons |= json.loads(notes.read_text())
    kept = 0
    temporary = folder / f"{MANIFEST}.{secrets.token_hex(8)}.incomplete"
    with open(temporary, "w") as file:
        for clip in index.clips:
            content = contents.get(os.path.abspath(clip.path))
            if content is not None and (content, clip.first_frame) in present:
                line = {"path": clip.path, "first_frame": clip.first_frame, "content": content.hex()}
                file.write(json.dumps(line) + "\n")
                kept += 1
        for path, reason in sorted(reasons.items()):
            file.write(json.dumps({"path": path, "dropped": reason}) + "\n")
    os.replace(temporary, folder / MANIFEST)
    return kept, len(index.clips) - kept


def _in_order(
    pool: ThreadPoolExecutor, work: object, clips: Iterator[Clip], ahead: int
) -> Iterator[tuple[Clip, Future[object]]]:
    """Runs ``work`` on each clip in the pool, a bounded number ahead of whoever takes the results."""
    assert callable(work)
    waiting: deque[tuple[Clip, Future[object]]] = deque()
    for clip in clips:
        waiting.append((clip, pool.submit(work, clip)))
        if len(waiting) >= ahead:
            yield waiting.popleft()
    yield from waiting
