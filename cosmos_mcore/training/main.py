"""The command line of training: checks first, then processes, then the run.

What needs no torch is checked before torch is imported, in the first process only, so a mistake in a config or a path
ends in one line within a second or two.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext

from cosmos_mcore.config import load_config, run_dir, to_yaml
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.imports import lasting_imports
from cosmos_mcore.parallel.launch import is_rank_zero, launched, processes_to_start, run_processes, world_size
from cosmos_mcore.training.plan import estimate_memory, keys_that_save_memory
from cosmos_mcore.training.preflight import derived_numbers, preflight
from cosmos_mcore.training.stopping import StopRequests, read_exit_code, write_exit_code


def main(arguments: list[str]) -> int:
    """Trains as the command line says.

    Returns:
        The exit code.

    Raises:
        ValueError: for a user's mistake.
    """
    args = _parser().parse_intermixed_args(arguments)
    config = load_config(args.config, args.overrides)
    if args.print_config:
        if is_rank_zero():
            print(to_yaml(config), end="")
        return 0
    if args.print_run_folder:
        if is_rank_zero():
            print(run_dir(config))
        return 0
    preflight(config, world_size())
    configure_logging()
    if args.dry_run:
        if is_rank_zero():
            from cosmos_mcore.training.dry_run import dry_run

            print(dry_run(config))
        return 0
    count = processes_to_start(config)
    if count:
        print(
            f"starting {count} processes for the parallel layout (as torchrun --nproc-per-node {count} would)",
            flush=True,
        )
        return run_processes(count, [sys.argv[0], *arguments]) or read_exit_code(run_dir(config))
    code = _train(config)
    # A launcher takes any other code for a crash; whoever started it reads the file.
    return 0 if launched() else code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a Cosmos autoregressive video model on MP4 files.")
    parser.add_argument("config", help="the run's YAML file, for example conf/tiny_cpu.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single keys of the YAML")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--print-run-folder", action="store_true", help="print where the run's files go and exit")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the numbers that follow from the config and exit",
    )
    return parser


def _train(config: RunConfig) -> int:
    with lasting_imports():
        import torch

        from cosmos_mcore.parallel.initialize import shut_down
        from cosmos_mcore.parallel.watchdog import Watchdog, spans_nodes
        from cosmos_mcore.training.setup import set_up
        from cosmos_mcore.training.trainer import Trainer

    if is_rank_zero():
        for line in derived_numbers(config, world_size()).splitlines():
            logging.getLogger(__name__).info(line)
        write_exit_code(run_dir(config), None)
    stops = StopRequests(run_dir(config), config.training.exit_duration_minutes)
    with stops.listening():
        try:
            run = set_up(config)
            with Watchdog() if spans_nodes() else nullcontext():
                reason = Trainer(run, stops=stops).train()
        except torch.OutOfMemoryError as error:
            helps = "; ".join(keys_that_save_memory(config, world_size()))
            raise ValueError(
                f"the GPU's memory is full ({str(error).split('. GPU')[0]}); the run was estimated to need "
                f"{estimate_memory(config, world_size())}. What helps, most first: {helps}"
            ) from error
        if is_rank_zero():
            stops.used_up()
            write_exit_code(run_dir(config), reason.exit_code)
        shut_down()
    return reason.exit_code
