"""Exact random access to the frames of an MP4 file, through PyAV.

Frame k is the k-th frame in presentation order, whatever the timestamps say: B-frames, a start time other than zero,
edit lists and a variable frame rate change nothing. To reach a frame, only its group of pictures is decoded.
"""

from __future__ import annotations

import bisect
import io
import math
import os
import time
from collections.abc import Sequence
from fractions import Fraction
from types import TracebackType
from typing import Any, NamedTuple

import av
import numpy as np

# Tags that are not UTF-8 must not cost a file; PyAV 19 replaces such bytes by itself and has dropped the option.
_OPEN_OPTIONS: dict[str, Any] = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


_INDEXED = ("mov,mp4", "avi")  # FFmpeg's names of the formats whose index has every frame, not keyframes only
_COLOUR_SPACES = {1: "bt709", 2: "unspecified", 5: "bt601", 6: "bt601"}  # FFmpeg's AVColorSpace
_COPY_RATE = 30  # frames per second of files that ``cut`` makes
_H264_IDR = 5  # type of the units of a picture that nothing before it is needed for


class UnreadableVideoError(Exception):
    """A video file, or a part of it, cannot be read; the message is the reason, without the file's name."""


class VideoFormat(NamedTuple):
    """How a file's frames are coded, by FFmpeg's names; ``rotation`` in degrees counterclockwise."""

    codec: str
    pixels: str
    height: int
    width: int
    rotation: int
    colour_space: str


class Cut(NamedTuple):
    """What ``Mp4File.cut`` gives.

    Attributes:
        data: an MP4 file.
        places: of the wanted frames among its frames.
        at_recovery_point: it starts with an H.264 keyframe that is no IDR picture (an open group of pictures), where
            some decoders, NVDEC among them, do not start: they give black frames.
    """

    data: bytes
    places: list[int]
    at_recovery_point: bool


class Mp4File:
    """An open MP4 file; a context manager.

    Attributes:
        path: the file.
        num_frames: frames that the file's index promises. Nothing is decoded to count them, so a damaged file may
            still turn out to have fewer.
        rate: frames per second on average; None where the file does not say.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = math.inf) -> None:
        """Opens the file and reads its index.

        Args:
            path: the file.
            timeout: seconds from now after which reading is given up.

        Raises:
            UnreadableVideoError: if there is no such file, or it is no video that can be decoded here.
        """
        self.path = path
        self._timeout, self._deadline = timeout, time.monotonic() + timeout
        try:
            size = os.stat(path).st_size
            self._container = av.open(os.fspath(path), **_OPEN_OPTIONS)
        except (av.error.FFmpegError, OSError) as error:
            raise UnreadableVideoError(f"cannot be opened ({_reason(error)})") from error
        kind = self._container.format.name
        if not kind.startswith(_INDEXED):
            self._container.close()
            raise UnreadableVideoError(
                f"is no MP4 file but {kind}, which has no index of its frames; convert it to MP4"
            )
        streams = self._container.streams.video
        if not streams or not streams[0].codec_context:
            self._container.close()
            raise UnreadableVideoError("has a video stream of an unknown codec" if streams else "has no video stream")
        self._stream = streams[0]
        # Parallelism comes from reading several clips at once; frame threads would only add delay and memory.
        self._stream.codec_context.thread_count = 1
        # In decode order. What lies behind the end of a file that was cut off while copying does not count.
        self._entries = [entry for entry in self._stream.index_entries if entry.pos + entry.size <= size]
        self.rate = self._stream.average_rate
        self.num_frames = sum(not entry.is_discard for entry in self._entries)

    def __enter__(self) -> Mp4File:
        """Returns the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._container.close()

    def read(self, numbers: Sequence[int]) -> np.ndarray:
        """Decodes frames, turned upright where the file says that the camera was held sideways.

        Args:
            numbers: frame numbers from 0, increasing.

        Returns:
            RGB frames [T, H, W, 3], uint8.

        Raises:
            UnreadableVideoError: if a frame is missing or damaged.
        """
        try:
            return self._read(numbers)
        except (av.error.FFmpegError, OSError) as error:
            raise UnreadableVideoError(
                f"frames {numbers[0]} to {numbers[-1]} cannot be decoded ({_reason(error)})"
            ) from error

    def first_format(self) -> VideoFormat:
        """See ``probe``; to be called before anything else is read."""
        try:
            frame = next(self._container.decode(self._stream), None)
        except (av.error.FFmpegError, OSError) as error:
            raise UnreadableVideoError(f"frame 0 cannot be decoded ({_reason(error)})") from error
        if frame is None:
            raise UnreadableVideoError("frame 0 is missing")
        space = _COLOUR_SPACES.get(int(frame.colorspace), "other")
        codec = self._stream.codec_context.codec.canonical_name  # whichever library decodes it
        return VideoFormat(codec, frame.format.name, frame.height, frame.width, round(frame.rotation), space)

    def cut(self, numbers: Sequence[int]) -> Cut:
        """Copies, without decoding, what frames need into a file of its own: from their keyframe on, at an even rate.

        Another decoder so needs no random access, and no idea of edit lists, start times or variable frame rates.

        Args:
            numbers: frame numbers from 0, increasing.

        Raises:
            UnreadableVideoError: if a frame is missing, or the packets are damaged.
        """
        try:
            packets, timestamps = self._demux(numbers[0], numbers[-1])
            wanted = self._timestamps(numbers, timestamps)
            packets = packets[_start(packets, wanted[0]) :]
            at_recovery_point = self._is_h264_recovery_point(packets[0])
            # Frames shown before the keyframe that they follow in the file refer to what lies before it.
            packets = [packet for packet in packets if _pts(packet) >= _pts(packets[0])]
            shown = sorted(map(_pts, packets))
            places = {timestamp: place for place, timestamp in enumerate(shown)}
            return Cut(self._mux(packets, places), [places[timestamp] for timestamp in wanted], at_recovery_point)
        except (av.error.FFmpegError, OSError, ValueError) as error:
            raise UnreadableVideoError(
                f"frames {numbers[0]} to {numbers[-1]} cannot be copied ({_reason(error)})"
            ) from error

    def _mux(self, packets: list[av.Packet], places: dict[int, int]) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format="mp4") as output:
            stream = output.add_stream_from_template(self._stream, opaque=True)  # else it asks for the codec's encoder
            # A frame may be shown no earlier than it is decoded.
            delay = max(number - places[_pts(packet)] for number, packet in enumerate(packets))
            for number, packet in enumerate(packets):
                packet.pts, packet.dts, packet.duration = places[_pts(packet)] + delay, number, 1
                packet.time_base = Fraction(1, _COPY_RATE)
                packet.stream = stream
            output.mux(packets)
        return file.getvalue()

    def _is_h264_recovery_point(self, keyframe: av.Packet) -> bool:
        context = self._stream.codec_context
        header = context.extradata
        if context.codec.canonical_name != "h264" or header is None or header[0] != 1:  # as MP4 files have it
            return False
        data, size = bytes(keyframe), (header[4] & 3) + 1
        place = 0
        while place + size < len(data):
            if data[place + size] & 31 == _H264_IDR:
                return False
            place += size + int.from_bytes(data[place : place + size], "big")
        return True

    def _timestamps(self, numbers: Sequence[int], timestamps: dict[int, int]) -> list[int]:
        missing = [number for number in numbers if number not in timestamps]
        if missing:
            raise UnreadableVideoError(
                f"frame {missing[0]} is missing although its index lists {self.num_frames} frames"
            )
        return [timestamps[number] for number in numbers]

    def _read(self, numbers: Sequence[int]) -> np.ndarray:
        packets, timestamps = self._demux(numbers[0], numbers[-1])
        wanted = self._timestamps(numbers, timestamps)
        start = _start(packets, wanted[0])
        found: dict[int, np.ndarray] = {}
        for packet in [*packets[start:], None]:  # None makes the decoder hand out the frames it holds back
            self._check_deadline()
            for frame in self._stream.codec_context.decode(packet):
                if frame.pts in wanted and not frame.is_corrupt:
                    found[frame.pts] = _upright_rgb(frame)
            if len(found) == len(wanted):
                break
        damaged = [number for number in numbers if timestamps[number] not in found]
        if damaged:
            raise UnreadableVideoError(f"frame {damaged[0]} is damaged")
        frames = [found[timestamp] for timestamp in wanted]
        if any(frame.shape != frames[0].shape for frame in frames):
            raise UnreadableVideoError(f"the frame size changes between frames {numbers[0]} and {numbers[-1]}")
        return np.stack(frames)

    def _demux(self, first: int, last: int) -> tuple[list[av.Packet], dict[int, int]]:
        """Reads, without decoding, the packets that frames ``first`` to ``last`` need.

        Returns:
            The packets in decode order, and the timestamp of each frame number from ``first`` or earlier to ``last``.
        """
        start = self._start_entry(first)
        if start:
            self._container.seek(self._entries[start].timestamp, stream=self._stream, backward=True)
        positions = {entry.timestamp: index for index, entry in enumerate(self._entries)}
        packets: list[av.Packet] = []
        shown: list[int] = []  # sorted timestamps of the frames from the first keyframe on
        landed: int | None = None  # position in the index of the first packet
        number = 0  # frame number of shown[0]
        for packet in self._container.demux(self._stream):
            self._check_deadline()
            if packet.pts is None or packet.dts is None:
                continue
            if not packets:
                landed = positions.get(packet.dts)
                if landed is None or landed > start:
                    raise UnreadableVideoError(f"seeking to frame {first} does not work")
                number = sum(not entry.is_discard for entry in self._entries[:landed])
            # Every later packet has pts >= dts > the last frame's pts, so the order up to that frame is final.
            elif len(shown) > last - number and packet.dts > shown[last - number]:
                break
            packets.append(packet)
            if packet.is_discard:
                continue
            if packet.pts < packets[0].pts and landed:
                number += 1  # shown before the keyframe that it follows in the file
            else:
                bisect.insort(shown, packet.pts)
        return packets, {number + i: timestamp for i, timestamp in enumerate(shown[: last - number + 1])}

    def _check_deadline(self) -> None:
        if time.monotonic() > self._deadline:
            raise UnreadableVideoError(f"was given up: it takes more than {self._timeout:g} s to decode")

    def _start_entry(self, frame: int) -> int:
        """A keyframe, as a position in the index, that is certain to be shown no later than ``frame``.

        That many frames come before a keyframe in the file, but a few behind it may be shown before it, too; they
        end before the next keyframe. So the last keyframe with few enough frames before it may be one too far.
        """
        keyframes = [0]
        shown = 0
        for index, entry in enumerate(self._entries):
            if shown > frame:
                break
            if entry.is_keyframe:
                keyframes.append(index)
            shown += not entry.is_discard
        return keyframes[-2] if len(keyframes) > 1 else 0


def _pts(packet: av.Packet) -> int:
    assert packet.pts is not None  # _demux has left the others out
    return packet.pts


def _start(packets: list[av.Packet], timestamp: int) -> int:
    """The last keyframe that is shown no later than a frame."""
    is_start = (packet.is_keyframe and _pts(packet) <= timestamp for packet in packets)
    return max((i for i, suitable in enumerate(is_start) if suitable), default=0)


def probe(path: str | os.PathLike[str], timeout: float = math.inf) -> VideoFormat:
    """Decodes a file's first frame to see how its frames are coded; headers do not tell all of it.

    Args:
        path: the file.
        timeout: seconds after which reading is given up.

    Raises:
        UnreadableVideoError: if there is no such file, or the frame is missing or damaged.
    """
    with Mp4File(path, timeout) as file:
        return file.first_format()


def _upright_rgb(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90))


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
