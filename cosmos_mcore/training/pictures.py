"""Pictures of a run, drawn beside training. A picture is not worth a run: what goes wrong with one is a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.mp4 import UnreadableVideoError

logger = logging.getLogger(__name__)


class PictureThread:
    """Draws one picture at a time in a thread.

    Args:
        what: it draws, for the warnings.
        device: of the run.
    """

    def __init__(self, what: str, device: torch.device) -> None:
        self._what, self._device = what, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=what.replace(" ", "-"))
        self._drawing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether the last picture is not finished; a slow disk must not pile them up."""
        return self._drawing is not None and not self._drawing.done()

    def start(self, draw: Callable[[], None]) -> None:
        """Has ``draw`` called in the thread."""
        self._drawing = self._pool.submit(self._draw, draw)

    def close(self) -> None:
        """Finishes the picture under way."""
        self._pool.shutdown(wait=True)

    def _draw(self, draw: Callable[[], None]) -> None:
        # A stream of its own: training's work does not queue up behind the drawing's.
        on_gpu = self._device.type == "cuda"
        with self.attempt(), torch.cuda.stream(torch.cuda.Stream(self._device)) if on_gpu else nullcontext():
            draw()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Turns whatever goes wrong in the block into a warning."""
        try:
            yield
        except Exception as error:
            logger.warning("no %s: %s: %s", self._what, type(error).__name__, error)


def frames_of(loader: ClipLoader, clip: Clip) -> Tensor | None:
    """Frames [3, T, H, W] float32 in [-1, 1] on the device; None where only the clip's ids are kept."""
    try:
        return loader.video(clip)
    except UnreadableVideoError:
        return None
