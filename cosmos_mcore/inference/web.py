"""What the page of ``examples/demo_app.py`` does: continues what was uploaded, and shows the frames as they come.

One process on a GPU or a CPU has the model, and one thread in it generates: whoever comes meanwhile waits.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import logging
import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosmos_mcore.config import RunConfig
from cosmos_mcore.inference.guardrail import Guardrail
from cosmos_mcore.inference.picture import GENERATED, GIVEN
from cosmos_mcore.inference.pipeline import Continuation, VideoPipeline, check_given
from cosmos_mcore.inference.prompts import PromptSource
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.video_io import frame_rate, read_conditioning, to_frames, write_mp4

logger = logging.getLogger(__name__)

GIVEN_FRAMES = 9  # of a video, as the command line's default; of an image one
MOST_CLIPS = 4  # that a video may be a chain of
_THUMBNAIL = 192  # pixels, its width

STYLE = f"""
.film {{ display: grid; grid-template-columns: repeat(8, 1fr); gap: 4px; }}
.film img, .film i {{ width: 100%; border-radius: 4px; box-sizing: border-box; display: block; }}
.film .given {{ border: 2px solid {GIVEN}; }}
.film .generated {{ border: 2px solid {GENERATED}; }}
.film .missing {{ border: 1px dashed #9ca3af; opacity: 0.5; }}
#status .html-container, #film .html-container {{ padding: 0; }}
.film p {{ grid-column: 2 / -1; align-self: center; margin: 0 0 0 0.5em; }}
.film b {{ display: inline-block; width: 0.8em; height: 0.8em; margin: 0 0.3em 0 1em; border-radius: 2px; }}
.status {{ min-height: 1.5em; }}
.status.failed {{ color: #dc2626; }}
"""


@dataclass(frozen=True)
class State:
    """What the page shows.

    Attributes:
        message: one line.
        failed: whether it tells of a mistake.
        film: the frames so far, as HTML; empty: none.
        video: the finished MP4; gone when the next state is asked for.
    """

    message: str
    failed: bool = False
    film: str = ""
    video: Path | None = None


class Studio:
    """Continues uploads, one at a time; a context manager that leaves no thread behind.

    Args:
        pipeline: of this process alone.
        config: of the model.
        prompts: embeds prompts; None for models that read no text.
        guardrail: checks everything that is shown; None: nothing does.
        folder: where the videos are until the page has them.
    """

    def __init__(
        self,
        pipeline: VideoPipeline,
        config: RunConfig,
        prompts: PromptSource | None,
        guardrail: Guardrail | None,
        folder: Path,
    ) -> None:
        self.pipeline, self.reads_text = pipeline, prompts is not None
        self._config, self._prompts, self._guardrail, self._folder = config, prompts, guardrail, folder
        self._numbers = itertools.count(1)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="generation")

    def __enter__(self) -> Studio:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Ends after the video under way."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def continue_upload(
        self, source: str | None, prompt: str, num_frames: int, temperature: float, top_p: float, seed: int | None
    ) -> Iterator[State]:
        """Generates; yields what the page shows, each time that it changes, a mistake included.

        Args:
            source: the uploaded file; None: there is none.
            prompt: what the video shows; looked at only if the model reads text.
            num_frames: of the result.
            temperature: as in ``SamplingOptions``.
            top_p: likewise.
            seed: of the draws; None: the field is empty.
        """
        path = None if source is None else Path(source)  # Gradio gives a kind of str that PyAV does not take
        try:
            options = SamplingOptions(temperature, top_p)
            yield from self._continue(path, prompt.strip(), int(num_frames), options, seed)
        except ValueError as error:
            # The visitor knows the file by its name, not by the place that it was uploaded to.
            message = str(error) if path is None else str(error).replace(str(path), path.name)
            yield State(f"error: {message}", failed=True)
        except Exception as error:
            logger.exception("a generation has failed")
            yield State(f"error: {type(error).__name__}: {' '.join(str(error).split())[:200]}", failed=True)

    def _continue(
        self, source: Path | None, prompt: str, num_frames: int, options: SamplingOptions, seed: int | None
    ) -> Iterator[State]:
        if source is None:
            raise ValueError("choose an image or a video first")
        if seed is None or not 0 <= seed < 2**32:
            raise ValueError(f"the seed must be a number between 0 and {2**32 - 1}")
        if self._prompts is not None:
            if not prompt:
                raise ValueError("say in the prompt what the video shows")
            self._prompts.check([prompt])
            if self._guardrail is not None and not self._guardrail.allows(prompt):
                raise ValueError("the guardrail blocks this prompt")
        data = self._config.data
        given = read_conditioning(source, GIVEN_FRAMES, data.height, data.width, data.frame_stride)
        num_given = check_given(self.pipeline.layout, given.shape[2:], num_frames)
        fps = frame_rate(source, data.frame_stride)
        yield State("waiting for the model ...")
        started = time.perf_counter()
        shown: queue.SimpleQueue[Tensor | None] = queue.SimpleQueue()
        abandoned = threading.Event()

        def show(videos: Tensor) -> None:
            if abandoned.is_set():
                raise _AbandonedError
            shown.put(videos[0])

        def generate() -> list[Continuation]:
            text = None
            if self._prompts is not None:
                embeddings = self._prompts.embed([prompt], self.pipeline.device, self.pipeline.network.group)
                text = embeddings[prompt][None]
            return self.pipeline.continue_videos(given, options, [seed], num_frames, text, show)

        future = self._worker.submit(generate)
        future.add_done_callback(lambda _: shown.put(None))
        try:
            while (video := shown.get()) is not None:
                frames = self._checked(video)
                decoding = "" if len(frames) < num_frames else "; the diffusion decoder makes the final ones"
                message = f"{len(frames)} of {num_frames} frames{decoding}"
                yield State(message, film=film(frames, num_frames, num_given))
            (made,) = future.result()
        finally:
            abandoned.set()
        frames = self._checked(made.video)
        path = write_mp4(self._folder / f"{source.stem}_{next(self._numbers)}.mp4", torch.from_numpy(frames), fps)
        seconds = time.perf_counter() - started
        message = f"{_size(made)} at {fps:g} frames per second, seed {seed}, in {seconds:.1f} s"
        try:
            yield State(message, film=film(frames, num_frames, num_given), video=path)
        finally:
            path.unlink()  # the page has a copy

    def _checked(self, video: Tensor) -> np.ndarray:
        """Frames [T, H, W, 3] uint8 of a video [3, T, H, W] that may be shown."""
        if self._guardrail is None:
            return to_frames(video)
        allowed = self._guardrail.check(video)
        if allowed is None:
            raise ValueError("the guardrail blocks this video")
        return allowed.numpy()


class _AbandonedError(Exception):
    """Nobody waits for the video any more."""


def _size(made: Continuation) -> str:
    _, frames, height, width = made.video.shape
    return f"{frames} frames of {height}x{width}"


def status_line(state: State) -> str:
    """The message as HTML."""
    return f'<div class="status{" failed" if state.failed else ""}" role="status">{html.escape(state.message)}</div>'


def film(frames: np.ndarray, num_frames: int, num_given: int) -> str:
    """Small pictures of all frames as HTML, with a place for each that is still missing.

    Args:
        frames: [T, H, W, 3] uint8, those that there are.
        num_frames: that there will be.
        num_given: that were not generated.
    """
    height, width = frames.shape[1:3]
    cells = [
        f'<img class="{"given" if number < num_given else "generated"}" alt="frame {number}" src="{_data_uri(frame)}">'
        for number, frame in enumerate(frames)
    ]
    cells += [f'<i class="missing" style="aspect-ratio: {width} / {height}"></i>'] * (num_frames - len(frames))
    legend = f'<p><b style="background: {GIVEN}"></b>given<b style="background: {GENERATED}"></b>generated</p>'
    return f'<div class="film">{cells[0]}{legend}{"".join(cells[1:])}</div>'


def _data_uri(frame: np.ndarray) -> str:
    """A frame [H, W, 3] uint8 as a JPEG within a page."""
    picture = Image.fromarray(frame)
    picture = picture.resize((_THUMBNAIL, max(1, round(_THUMBNAIL * picture.height / picture.width))))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
