"""Imports of large libraries without the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Around the imports of torch and Megatron: the garbage collector is told that what they make stays.

    It would look at their half a million objects again and again, which takes two seconds of each start and end, and
    holds up training now and then.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
