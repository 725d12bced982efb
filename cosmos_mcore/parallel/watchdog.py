"""Ends a rank when another one, on another node, is gone.

On one node the launcher does it. Between nodes nobody does: NCCL waits for its timeout, half an hour by default. Each
rank's watchdog gives signs of life and looks for those of its neighbour; who misses them, or fails, says so to all.
"""

from __future__ import annotations

import os
import sys
import threading
import time

import torch.distributed as dist

from cosmos_mcore.parallel.agreement import from_rank_zero

_INTERVAL = 5.0  # seconds between two signs of life
_PATIENCE = 40.0  # seconds without one after which a rank counts as lost


class Watchdog:
    """Watches the other ranks from a thread; a context manager. All ranks enter it together.

    Args:
        interval: seconds between two signs of life.
        patience: seconds without one after which a rank counts as lost.
    """

    def __init__(self, interval: float = _INTERVAL, patience: float = _PATIENCE) -> None:
        self._interval, self._patience = interval, patience
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        host = os.environ["MASTER_ADDR"]
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if self._rank == 0 else None
        port = from_rank_zero(store.port if store is not None else None)
        self._store = store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False)
        self._ended = threading.Event()
        self._answered = time.monotonic()  # when rank 0, which keeps the store, was last heard
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Starts watching."""
        self._answered = time.monotonic()
        self._thread.start()
        threading.Thread(target=self._watch_store, name="watchdog of the store", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Ends; after an error tells the other ranks."""
        self._ended.set()
        self._thread.join(self._patience)
        if self._thread.is_alive():
            return  # it waits for a rank 0 that has vanished, and so would what follows
        try:
            if error is not None:
                self._store.set("failed", f"rank {self._rank} has failed")
            self._store.set(f"left/{self._rank}", "1")
            if self._rank == 0:  # who keeps the store leaves last
                self._wait_for_the_others(error is not None)
        except RuntimeError:
            pass  # rank 0, which keeps the store, has left before

    def _wait_for_the_others(self, failed: bool) -> None:
        deadline = time.monotonic() + (2 * self._interval if failed else self._patience)
        names = [f"left/{rank}" for rank in range(self._ranks)]
        while time.monotonic() < deadline and not self._store.check(names):
            time.sleep(0.05)

    def _watch(self) -> None:
        neighbour = (self._rank + 1) % self._ranks
        last_sign, last_seen, count = b"", time.monotonic(), 0
        while not self._ended.wait(self._interval):
            try:
                count += 1
                self._store.set(f"alive/{self._rank}", str(count))
                if self._store.check(["failed"]):
                    self._end(self._store.get("failed").decode())
                if self._store.check([f"alive/{neighbour}"]):
                    sign = self._store.get(f"alive/{neighbour}")
                    if sign != last_sign:
                        last_sign, last_seen = sign, time.monotonic()
                left = self._store.check([f"left/{neighbour}"])
                self._answered = time.monotonic()
                if not left and time.monotonic() - last_seen > self._patience:
                    self._store.set("failed", f"rank {neighbour} gives no sign of life")
                    self._end(f"rank {neighbour} gives no sign of life")
            except RuntimeError:
                if time.monotonic() - self._answered > self._patience / 2:
                    self._end("rank 0 does not answer")

    def _watch_store(self) -> None:
        """A thread of its own, as a call to the store of a rank 0 that is frozen or on a lost machine never returns."""
        while not self._ended.wait(self._interval):
            if time.monotonic() - self._answered > self._patience:
                self._end("rank 0 does not answer")

    def _end(self, why: str) -> None:
        if not self._ended.is_set():
            print(f"rank {self._rank} ends: {why}", file=sys.stderr, flush=True)
            os._exit(1)


def spans_nodes() -> bool:
    """Whether the ranks live on more than one node, as torchrun has started them."""
    return dist.get_world_size() > int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
