"""Ranks of ``test_watchdog.py``: ``python -m tests.parallel.watchdog_worker MODE``.

Rank 1 falls silent (MODE silent: killed; MODE failed: an exception), or rank 0 (MODE frozen), while the others do not
communicate, as in a hang.
"""

import os
import signal
import sys
import time

import torch.distributed as dist

from cosmos_mcore.config.schema import ParallelConfig
from cosmos_mcore.parallel.initialize import initialize
from cosmos_mcore.parallel.watchdog import Watchdog


def main(mode):
    """Ends by the watchdog's hand, or after ``finished``."""
    initialize(ParallelConfig(), seed=0)
    with Watchdog(interval=0.1, patience=1.0):
        dist.barrier()  # both have entered
        if dist.get_rank() == 1 and mode == "silent":
            os.kill(os.getpid(), signal.SIGKILL)
        if dist.get_rank() == 0 and mode == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        if dist.get_rank() == 1 and mode == "failed":
            raise ArithmeticError("the first error")
        time.sleep(0.5 if mode == "finished" else 60)


if __name__ == "__main__":
    main(sys.argv[1])
