"""Fills a folder with the embeddings of a config's prompts before training; any number of processes may do it."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from cosmos_mcore.config import RunConfig
from cosmos_mcore.config.derived import prompt_cache_dir
from cosmos_mcore.data.index import prompts_of
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.parts import device_of, progress_bar, read_arguments
from cosmos_mcore.text.cache import BATCH, EmbeddingCache

logger = logging.getLogger(__name__)

_NAMED = 10  # videos without a prompt


def main(arguments: list[str]) -> int:
    """Embeds as the command line says.

    Returns:
        The exit code.

    Raises:
        ValueError: for a user's mistake.
    """
    parser = argparse.ArgumentParser(
        description="Embed the prompts of a config's videos (data.path, data.validation_path, data.prompts) into the "
        "folder data.prompt_cache, so that training needs no text encoder. Run as many processes as you like, with "
        "torchrun or with --part; run again to go on."
    )
    parser.add_argument(
        "--text_encoder",
        type=Path,
        default=Path("checkpoints/google-t5/t5-11b"),
        help="folder of a T5 model; default: %(default)s",
    )
    args, config, part = read_arguments(parser, arguments)
    configure_logging()
    prompts = _prompts(config, report=part[0] == 0)

    from cosmos_mcore.text.encoder import fingerprint_of  # now, since it loads torch

    cache = EmbeddingCache(prompt_cache_dir(config), fingerprint_of(args.text_encoder))
    # Every N-th, so that prompts of all lengths, which cost differently, fall to each process.
    mine = prompts[part[0] :: part[1]]
    made = embed(cache, mine, args.text_encoder, part)
    lacking = len(cache.missing(prompts))
    logger.info(
        "part %d of %d: %d prompts embedded, %d were there; %s has %d of %d prompts",
        *(*part, made, len(mine) - made, cache.folder, len(prompts) - lacking, len(prompts)),
    )
    return 0


def embed(cache: EmbeddingCache, prompts: list[str], text_encoder: Path, part: tuple[int, int]) -> int:
    """Embeds those of the prompts that are missing; the encoder is loaded only if there are any.

    Args:
        cache: where embeddings go.
        prompts: all different.
        text_encoder: folder of the encoder.
        part: (which, of how many) this process is; 0 based.

    Returns:
        How many were missing.

    Raises:
        ValueError: if the encoder cannot be loaded, or the folder not be written.
    """
    from cosmos_mcore.text.encoder import TextEncoder

    missing = sorted(cache.missing(prompts), key=len, reverse=True)  # prompts of a batch are padded to the longest
    if not missing:
        return 0
    encoder = TextEncoder.from_folder(text_encoder, device_of(part))
    with progress_bar(len(missing), "prompt", part) as bar:
        for first in range(0, len(missing), BATCH):
            batch = missing[first : first + BATCH]
            cache.add(batch, encoder)
            bar.update(len(batch))
    return len(missing)


def _prompts(config: RunConfig, report: bool) -> list[str]:
    """All prompts of the run, each once, in an order that does not depend on the process."""
    paths = [config.data.path]
    if config.data.validation_path is not None:
        paths.append(config.data.validation_path)
    prompts: set[str] = set()
    for path in paths:
        found = prompts_of(replace(config.data, path=path))
        prompts.update(found.by_path.values())
        if report and found.missing:
            for video, reason in list(found.missing.items())[:_NAMED]:
                logger.warning("%s %s", video, reason)
            logger.warning("%d of the videos have no prompt; training will skip them", len(found.missing))
    return sorted(prompts)
