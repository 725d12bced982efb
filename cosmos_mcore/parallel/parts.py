"""Work that any number of processes share without talking to each other: each does its part."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from cosmos_mcore.config import RunConfig, load_config

if TYPE_CHECKING:  # a mistake on the command line is told before torch is loaded
    import torch


def read_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, RunConfig, tuple[int, int]]:
    """Adds the arguments that name a config and a part of the work, and reads them all.

    Returns:
        All arguments, the config, and which part this process does, 0 based, and of how many.

    Raises:
        ValueError: for a user's mistake.
    """
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces keys of the file")
    parser.add_argument("--part", help="I/N: this process does the I-th of N equal parts, from 0; default: torchrun's")
    args = parser.parse_intermixed_args(arguments)
    return args, load_config(args.config, args.overrides), part_of(args.part)


def part_of(text: str | None) -> tuple[int, int]:
    """Which part this process does, 0 based, and of how many.

    Args:
        text: ``I/N`` from the command line; None: as torchrun's environment says, or all of it.

    Raises:
        ValueError: if it is something else.
    """
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    which, _, count = text.partition("/")
    if not (which.isdigit() and count.isdigit() and int(which) < int(count)):
        raise ValueError(f"--part {text} must be I/N with I from 0 to N - 1, for example 0/8")
    return int(which), int(count)


def device_of(part: tuple[int, int]) -> torch.device:
    """The GPU of this process, which becomes the current one, or the CPU where there is none."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", part[0])) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def progress_bar(total: int, unit: str, part: tuple[int, int]) -> tqdm:
    """A bar on a line of the terminal of its own; into a file, a line every 30 seconds."""
    seconds = 1 if sys.stderr.isatty() else 30
    place = int(os.environ.get("LOCAL_RANK", "0"))
    title = f"part {part[0]} of {part[1]}"
    return tqdm(total=total, unit=unit, desc=title, dynamic_ncols=True, mininterval=seconds, position=place)
