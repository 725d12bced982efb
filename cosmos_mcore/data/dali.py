"""Decodes clips with NVIDIA DALI: on a GPU with its video engines (NVDEC), without one with DALI's own CPU decoders.

FFmpeg's demuxer cuts the packets that a clip needs out of its file (``Mp4File.cut``), so DALI gets a few hundred
kilobytes whatever the file's length, always in the same simple form. Several pipelines run at once, each in a thread of
its own with a stream of its own: one pipeline keeps at most one of a GPU's engines busy (an H100 has seven).
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import nvidia.dali
import nvidia.dali.fn
import nvidia.dali.types
import torch
from torch import Tensor

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.decode import ClipDecoder, PyAVDecoder
from cosmos_mcore.data.images import is_image
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.mp4 import Mp4File, UnreadableVideoError, VideoFormat, probe
from cosmos_mcore.data.transforms import cover
from cosmos_mcore.tokenizer.cuda_graph import no_capture

logger = logging.getLogger(__name__)

_PIPELINES = 4
_BATCH = 4  # clips per run of a pipeline
_NVDEC_CODECS = {"h264", "hevc", "av1", "vp9", "vp8"}
_CPU_CODECS = {"vp9", "vp8", "mjpeg"}
_NOT_BY_THIS_GPU = "is not supported by NVDEC"  # DALI's words for a codec that the GPU's engines do not know
_REASON = 300  # characters of DALI's errors in the log
_NVDEC_SMALLEST = 144  # pixels; below it, some codecs' engines refuse
_BT601, _BT709 = (0.299, 0.114), (0.2126, 0.0722)  # weights of red and blue in luma


@dataclass
class _Request:
    """One clip on its way through a pipeline."""

    data: np.ndarray
    numbers: np.ndarray
    source: tuple[int, int]  # height and width of the file's frames
    colours: Tensor | None
    alone: bool  # not in one run with others: one of them has failed
    started: threading.Event = field(default_factory=threading.Event)
    result: Future[Tensor] = field(default_factory=Future)
    worker: _Worker | None = None


class DaliDecoder(ClipDecoder):
    """Decodes many clips at once.

    Colours are converted by DALI as BT.601, and corrected where the file says BT.709. What NVDEC cannot do, or PyAV
    does better (rotated, more than 8 bits, other chroma, rare codecs, tiny frames, images, H.264 that starts at no IDR
    picture), is decoded by PyAV.

    Attributes:
        waiting: clips that wait for a pipeline.
        on_cpu: clips that PyAV has decoded instead.
        abandoned: clips that were given up since they took too long.
    """

    name = "dali"

    def __init__(self, config: DataConfig, device: torch.device) -> None:
        """Builds the pipelines.

        Args:
            config: read are ``height``, ``width``, ``decode_timeout``.
            device: where the frames go; a GPU, or the CPU to decode what DALI can decode there.
        """
        self.parallel_clips = 2 * _PIPELINES * _BATCH  # the next runs are being cut while the present ones decode
        self._config, self._device = config, device
        self._pyav = PyAVDecoder(config)
        self._codecs = _NVDEC_CODECS if device.type == "cuda" else _CPU_CODECS
        self._requests: queue.Queue[_Request | None] = queue.Queue()
        self._formats: dict[tuple[str, int, int], VideoFormat] = {}
        self._lock = threading.Lock()
        self.on_cpu = self.abandoned = 0
        self._warned = False
        self._workers = [_Worker(self._requests, config, device) for _ in range(_PIPELINES)]

    @property
    def waiting(self) -> int:
        """Clips that wait for a pipeline."""
        return self._requests.qsize()

    def decode(self, clip: Clip) -> Tensor:
        """See ``ClipDecoder.decode``; the frames are on the device."""
        if is_image(clip.path):
            return self._on_cpu(clip)
        form = self._format(clip.path)
        if not self._suits(form):
            return self._on_cpu(clip)
        with Mp4File(clip.path, self._config.decode_timeout) as file:
            cut = file.cut(clip.frame_numbers)
        if cut.at_recovery_point:
            return self._on_cpu(clip)
        colours = _from_601_to_709() if form.colour_space == "bt709" else None
        for alone in (False, True):
            data, places = np.frombuffer(cut.data, np.uint8), np.array(cut.places, np.int32)
            request = _Request(data, places, (form.height, form.width), colours, alone)
            self._requests.put(request)
            request.started.wait()
            try:
                return request.result.result(self._config.decode_timeout)
            except TimeoutError:
                self._abandon(request)
                if alone:
                    with self._lock:
                        self.abandoned += 1
                    raise UnreadableVideoError(
                        f"was given up: it takes more than {self._config.decode_timeout:g} s to decode"
                    ) from None
            except _DecodeError as error:
                reason = error
                if alone and _NOT_BY_THIS_GPU in str(error):  # so no other file of this codec will be
                    self._codecs = self._codecs - {form.codec}
        # PyAV either can, or knows the reason better.
        if not self._warned:
            self._warned = True
            words = " ".join(str(reason).split())[:_REASON] or "no reason given"
            logger.warning("DALI cannot decode %s, PyAV is asked (said once): %s", clip.path, words)
        return self._on_cpu(clip)

    def close(self) -> None:
        """Ends the pipelines."""
        for _ in self._workers:
            self._requests.put(None)
        for worker in self._workers:
            worker.thread.join(self._config.decode_timeout)

    def _format(self, path: str) -> VideoFormat:
        try:
            status = os.stat(path)
        except OSError as error:
            raise UnreadableVideoError(f"cannot be opened ({error.strerror or error})") from error
        state = (path, status.st_size, status.st_mtime_ns)
        if state not in self._formats:
            self._formats[state] = probe(path, self._config.decode_timeout)
        return self._formats[state]

    def _suits(self, form: VideoFormat) -> bool:
        smallest = _NVDEC_SMALLEST if self._device.type == "cuda" else 1
        return (
            form.codec in self._codecs
            and form.pixels in ("yuv420p", "yuvj420p")
            and form.rotation == 0
            and form.colour_space != "other"
            and min(form.height, form.width) >= smallest
        )

    def _on_cpu(self, clip: Clip) -> Tensor:
        with self._lock:
            self.on_cpu += 1
        return self._pyav.decode(clip)

    def _abandon(self, request: _Request) -> None:
        """Puts a new worker in the place of the one that does not come back."""
        with self._lock:
            worker = request.worker
            if worker in self._workers:
                assert worker is not None
                worker.abandoned = True
                self._workers[self._workers.index(worker)] = _Worker(self._requests, self._config, self._device)


class _DecodeError(Exception):
    """DALI cannot decode a clip, or one of those in the same run."""


class _Worker:
    """One pipeline and the thread that runs it; a daemon, since it may hang in a driver."""

    def __init__(self, requests: queue.Queue[_Request | None], config: DataConfig, device: torch.device) -> None:
        self._requests, self._config, self._device = requests, config, device
        self.abandoned = False
        self._pipeline: Any = None
        self.thread = threading.Thread(target=self._work, name="clip-dali", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while not self.abandoned:
            batch = self._take()
            if not batch:
                return
            for request in batch:
                request.worker = self
                request.started.set()
            try:
                frames = self._run(batch)
            except Exception as error:  # of whatever kind: the loader must not wait for an answer that never comes
                self._pipeline = None  # after an error it is of no use any more
                for request in batch:
                    request.result.set_exception(_DecodeError(str(error)))
            else:
                for request, clip in zip(batch, frames, strict=True):
                    request.result.set_result(clip)

    def _take(self) -> list[_Request]:
        """Waits for one request and takes what else is there; nothing when the decoder is closed."""
        batch: list[_Request] = []
        while len(batch) < _BATCH:
            try:
                request = self._requests.get(block=not batch)
            except queue.Empty:
                break
            if request is None:
                if batch:
                    self._requests.put(None)  # for the next turn
                break
            if request.alone and batch:
                self._requests.put(request)
                break
            batch.append(request)
            if request.alone:
                break
        return batch

    def _run(self, batch: list[_Request]) -> list[Tensor]:
        if self._device.type == "cpu":
            return self._decode(batch)
        if self._pipeline is None:
            torch.cuda.set_device(self._device)
            self._stream = torch.cuda.Stream(self._device)
        with no_capture(), torch.cuda.stream(self._stream):
            frames = self._decode(batch)
            self._stream.synchronize()  # the frames are complete for whatever stream they are used on
        return frames

    def _decode(self, batch: list[_Request]) -> list[Tensor]:
        if self._pipeline is None:
            self._pipeline = _build_pipeline(self._device)
        self._pipeline.feed_input("encoded", [request.data for request in batch])
        self._pipeline.feed_input("numbers", [request.numbers for request in batch])
        target = (self._config.height, self._config.width)
        covers = [cover(request.source, target) for request in batch]
        self._pipeline.feed_input("sizes", [np.array(size, np.float32) for size, _, _ in covers])
        (outputs,) = self._pipeline.run()
        clips = []
        for request, (_, top, left), output in zip(batch, covers, outputs, strict=True):
            frames = torch.from_dlpack(output).permute(0, 3, 1, 2)
            frames = frames[..., top : top + target[0], left : left + target[1]]
            clips.append(frames.clone() if request.colours is None else _correct(frames, request.colours))
        return clips


def _build_pipeline(device: torch.device) -> Any:
    fn, types = nvidia.dali.fn, nvidia.dali.types
    gpu = device.type == "cuda"
    pipeline = nvidia.dali.Pipeline(
        batch_size=_BATCH, num_threads=_BATCH, device_id=device.index if gpu else None, prefetch_queue_depth=1
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        numbers = fn.external_source(name="numbers", dtype=types.INT32, ndim=1)
        sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
        device_name = "mixed" if gpu else "cpu"
        # affine pins threads to cores, which all pipelines would choose alike.
        # DALI 1 has it among its experiments only.
        decode = fn.decoders.video if hasattr(fn.decoders, "video") else fn.experimental.decoders.video
        frames = decode(encoded, frames=numbers, device=device_name, affine=False, pad_mode="none")
        # In PyTorch the same takes several times as long on a GPU.
        frames = fn.resize(frames, size=sizes, interp_type=types.INTERP_CUBIC, antialias=True)
        pipeline.set_outputs(frames)
    pipeline.build()
    return pipeline


def _from_601_to_709() -> Tensor:
    """The matrix [3, 3] that mends RGB converted as BT.601 where BT.709 is right."""

    def luma_chroma(red: float, blue: float) -> Tensor:
        luma = torch.tensor([red, 1 - red - blue, blue], dtype=torch.float64)
        unit = torch.eye(3, dtype=torch.float64)
        return torch.stack([luma, (unit[2] - luma) / (1 - blue), (unit[0] - luma) / (1 - red)])

    return (torch.linalg.inv(luma_chroma(*_BT709)) @ luma_chroma(*_BT601)).to(torch.float32)


def _correct(frames: Tensor, colours: Tensor) -> Tensor:
    """Multiplies the colours of frames [T, 3, H, W] uint8 with a matrix."""
    mixed = torch.einsum("ij,tjhw->tihw", colours.to(frames.device), frames.to(torch.float32))
    return mixed.round_().clamp_(0, 255).to(torch.uint8)
