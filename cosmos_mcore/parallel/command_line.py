"""What all command lines share: one line for a user's mistake, exit codes, logging."""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from cosmos_mcore.parallel.launch import die_with_parent, is_rank_zero, launched

USER_ERROR = 2


def run_command(command: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Runs a command with its arguments and exits with the code that it returns; 2 after a user's mistake."""
    die_with_parent()
    try:
        code = command(list(sys.argv[1:] if argv is None else argv))
    except (Exception, KeyboardInterrupt) as error:
        code = 130 if isinstance(error, KeyboardInterrupt) else report_error(error)
        if launched():
            # Threads of the run may be within C++ code, which Python's way to end waits for, or aborts with a message.
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def report_error(error: Exception) -> int:
    """Tells the user what went wrong, once for all ranks, and returns the exit code.

    One line where our own code has raised a ``ValueError``, which it does for users' mistakes; else the traceback.
    """
    if lost_peer(error):
        time.sleep(10)  # the launcher ends this rank meanwhile, and the lost one has told why
    elif not is_rank_zero():
        # Most errors hit all ranks alike. Rank 0 speaks, and its launcher ends the others meanwhile; a rank that failed
        # alone speaks for itself.
        time.sleep(10)
    if isinstance(error, ValueError) and _raised_by_us(error):
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    traceback.print_exception(error)
    return 1


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone; that one has the true reason."""
    if not isinstance(error, RuntimeError):
        return False
    text = str(error)
    signs = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Connection refused")
    return any(sign in text for sign in signs)


def configure_logging() -> None:
    """Our own messages on rank 0, as they are; warnings and worse of everything else."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stdout, force=True
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("cosmos_mcore")
    ours.handlers = [handler]
    ours.propagate = False
    ours.setLevel(logging.INFO if is_rank_zero() else logging.WARNING)
    # megatron-core 0.19 recommends an interface to us that 0.16 does not have; what it does without is the same.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    # Where there are CUDA tools but no GPU, torch says so on standard error, in every process.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Megatron and torch warn, in every process, about each optional package that is missing and about their own future;
    # in CPU mode the warnings of torch functions come from the frame that stands between.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|cosmos_mcore\.parallel\.cpu_mode)\b.*")


def _raised_by_us(error: Exception) -> bool:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parents[1])
