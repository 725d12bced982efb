"""The command line of training: checks first, then processes, then the run.

What needs no torch is checked before torch is imported, in the first process only, so a mistake in a config or a path
ends in one line within a second or two.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from cosmos_mcore.config import load_config, to_yaml
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.parallel.launch import die_with_parent, is_rank_zero, processes_to_start, run_processes, world_size
from cosmos_mcore.training.preflight import derived_numbers, preflight

USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; exits with 2 and one line on standard error for a user's mistake."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    die_with_parent()
    try:
        code = _run(_parser().parse_args(arguments), arguments)
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        code = report_error(error)
    sys.exit(code)


def report_error(error: Exception) -> int:
    """Tells the user what went wrong, once for all ranks, and returns the exit code.

    One line where our own code has raised a ``ValueError``, which it does for users' mistakes; else the traceback.
    """
    if not is_rank_zero():
        # Most errors hit all ranks alike. Rank 0 speaks, and its launcher ends the others meanwhile; a rank that failed
        # alone speaks for itself.
        time.sleep(3)
    if isinstance(error, ValueError) and _raised_by_us(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    traceback.print_exception(error)
    return 1


def _raised_by_us(error: Exception) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parents[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a Cosmos autoregressive video model on MP4 files.")
    parser.add_argument("config", help="the run's YAML file, for example conf/tiny_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single keys of the YAML")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, print the numbers that follow from the config and exit"
    )
    return parser


def _run(args: argparse.Namespace, arguments: Sequence[str]) -> int:
    config = load_config(args.config, args.overrides)
    if args.print_config:
        if is_rank_zero():
            print(to_yaml(config), end="")
        return 0
    preflight(config, world_size())
    if args.dry_run:
        if is_rank_zero():
            from cosmos_mcore.training.dry_run import dry_run

            print(dry_run(config))
        return 0
    count = processes_to_start(config)
    if count:
        print(f"starting {count} processes for the parallel layout (as torchrun --nproc-per-node {count} would)", flush=True)
        return run_processes(count, [sys.argv[0], *arguments])
    _train(config)
    return 0


def _train(config: RunConfig) -> None:
    _configure_logging()
    from cosmos_mcore.parallel.initialize import shut_down
    from cosmos_mcore.training.setup import set_up
    from cosmos_mcore.training.trainer import Trainer

    if is_rank_zero():
        for line in derived_numbers(config, world_size()).splitlines():
            logging.getLogger(__name__).info(line)
    Trainer(set_up(config)).train()
    shut_down()


def _configure_logging() -> None:
    """Our own messages on rank 0, as they are; warnings and worse of everything else."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout, force=True)
    ours = logging.getLogger("cosmos_mcore")
    ours.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours.handlers = [handler]
    # Megatron and torch warn on every rank of what is absent by design on a CPU (Apex, Transformer Engine).
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\b.*")
