"""The DALI decoder on a CPU, where it knows VP9 and MJPEG."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data import clip_tokens
from cosmos_mcore.data.decode import PyAVDecoder
from cosmos_mcore.data.index import Clip, index_clips
from cosmos_mcore.data.mp4 import UnreadableVideoError
from tests.data.test_loader import read, small_config
from tests.videos import moving_square, read_stamp, write_test_clip

pytest.importorskip("nvidia.dali", reason="DALI has packages for Linux only")
from cosmos_mcore.data import dali  # noqa: E402

CPU = torch.device("cpu")
VP9 = {"codec": "libvpx-vp9", "bframes": 0, "codec_options": {"deadline": "realtime", "cpu-used": "8", "b": "2M"}}


def write_mjpeg(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=30, options={"qscale": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        for number in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moving_square(number, 64, 96), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def vp9(tmp_path_factory):
    return write_test_clip(tmp_path_factory.mktemp("vp9") / "clip.mp4", 60, 192, 320, **VP9)


@pytest.fixture
def decoder():
    opened = []

    def build(**settings):
        opened.append(dali.DaliDecoder(DataConfig(**{"height": 96, "width": 160, **settings}), CPU))
        return opened[-1]

    yield build
    for one in opened:
        one.close()
    deadline = time.monotonic() + 5
    while any(thread.name == "clip-dali" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def difference(one, other):
    return (one.int() - other.int()).abs().float().mean().item()


def test_pixels_agree_with_pyav(vp9, decoder, tmp_path):
    both = decoder(), PyAVDecoder(DataConfig(height=96, width=160))
    for path, numbers in ((vp9, (20, 3, 13)), (vp9, (0, 1, 9)), (write_mjpeg(tmp_path / "m.mp4", 20), (5, 2, 5))):
        clip = Clip(str(path), *numbers)
        found, expected = (one.decode(clip) for one in both)
        assert found.shape == expected.shape == (numbers[2], 3, 96, 160)
        assert difference(found, expected) < 2
    assert both[0].on_cpu == 0


def wave(number, height, width):
    rows, columns = np.mgrid[:height, :width]
    planes = (np.sin(columns / 5 + number / 3), np.cos(rows / 7), np.sin((rows + columns) / 9))
    return (127 + 100 * np.stack(planes, -1)).astype(np.uint8)


@pytest.mark.parametrize("size", [(191, 319), (97, 161), (33, 35), (63, 701), (701, 63)])
def test_odd_sizes_are_scaled_as_by_pyav(decoder, tmp_path, size):
    """Widths are odd: then both convert colours alike, so nothing but the scaling could differ."""
    clip = Clip(str(write_test_clip(tmp_path / "clip.mp4", 3, *size, draw=wave, **VP9)), 0, 1, 3)
    one = decoder()
    found, expected = one.decode(clip), PyAVDecoder(DataConfig(height=96, width=160)).decode(clip)
    assert one.on_cpu == 0
    assert (found.int() - expected.int()).abs().max() <= 2 and difference(found, expected) < 0.05


def test_a_file_whose_frames_change_their_size(decoder, tmp_path):
    """DALI knows the size of the first frame only; PyAV that of each."""
    parts = [write_test_clip(tmp_path / f"{height}.mp4", 9, height, 160, draw=wave, **VP9) for height in (96, 144)]
    both = tmp_path / "both.mp4"
    with av.open(str(both), "w") as output:
        copies = 0
        for part in parts:
            with av.open(str(part)) as source:
                stream = output.streams.video[0] if copies else output.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.dts is not None:
                        packet.pts = packet.dts = copies
                        packet.time_base, packet.stream = Fraction(1, 30), stream
                        output.mux(packet)
                        copies += 1
    one = decoder()
    expected = PyAVDecoder(DataConfig(height=96, width=160)).decode(Clip(str(both), 9, 1, 9))
    assert torch.equal(one.decode(Clip(str(both), 9, 1, 9)), expected)
    with pytest.raises(UnreadableVideoError, match="the frame size changes between frames 4 and 12"):
        one.decode(Clip(str(both), 4, 1, 9))


def test_exact_frames_many_at_once(vp9, decoder):
    whole = decoder(height=192, width=320)
    clips = [Clip(str(vp9), first, 1 + first % 3, 9) for first in range(0, 40)]
    clips = [clip for clip in clips if clip.frame_numbers[-1] < 60]
    with ThreadPoolExecutor(20) as pool:
        for clip, frames in zip(clips, pool.map(whole.decode, clips), strict=True):
            stamps = [read_stamp(frame.permute(1, 2, 0).numpy()) for frame in frames]
            assert stamps == list(clip.frame_numbers)


@pytest.mark.parametrize("kind", ["rotated", "h264", "bt2020"])
def test_what_dali_cannot_do_is_decoded_by_pyav(tmp_path, decoder, kind):
    """On a CPU, H.264 stands for what NVDEC does not know."""
    options = {"rotated": {**VP9, "rotation": 90}, "h264": {}, "bt2020": VP9}[kind]
    path = write_test_clip(tmp_path / "clip.mp4", 12, 64, 96, **options)
    one = decoder(height=64, width=64)
    if kind == "bt2020":
        one._format = lambda path: dali.VideoFormat("vp9", "yuv420p", 64, 96, 0, "other")
    clip = Clip(str(path), 2, 1, 9)
    assert torch.equal(one.decode(clip), PyAVDecoder(DataConfig(height=64, width=64)).decode(clip))
    assert one.on_cpu == 1


def test_bt709(tmp_path, decoder):
    options = {**VP9, "codec_options": {**VP9["codec_options"], "colorspace": "bt709"}}
    path = write_test_clip(tmp_path / "clip.mp4", 9, 96, 160, draw=moving_square, **options)
    clip, one = Clip(str(path), 0, 1, 9), decoder()
    assert one._format(clip.path).colour_space == "bt709"
    expected = PyAVDecoder(DataConfig(height=96, width=160)).decode(clip)
    # DALI does not heed the tag.
    assert difference(one.decode(clip), expected) < 1.5
    mended = dali._correct(as_bt601(path), dali._from_601_to_709())
    assert difference(mended, expected) < 0.7 < 1.6 < difference(as_bt601(path), expected)


def as_bt601(path):
    with av.open(str(path)) as container:
        frames = [f.reformat(format="rgb24", src_colorspace="itu601").to_ndarray() for f in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def test_a_damaged_clip_spoils_no_other(vp9, decoder, tmp_path, monkeypatch):
    """A run of a pipeline fails as a whole; its clips are tried again one by one."""
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(vp9.read_bytes())
    one, cut = decoder(), dali.Mp4File.cut

    def broken(self, numbers):
        found = cut(self, numbers)
        return found._replace(data=found.data[: len(found.data) // 2]) if "bad" in str(self.path) else found

    monkeypatch.setattr(dali.Mp4File, "cut", broken)
    clips = [Clip(str(path), first, 1, 9) for first in range(6) for path in (vp9, bad)]
    with ThreadPoolExecutor(12) as pool:
        frames = list(pool.map(one.decode, clips))
    assert one.on_cpu == 6
    for i in range(6):
        assert difference(frames[2 * i], frames[2 * i + 1]) < 2


def test_a_codec_that_the_gpu_does_not_know_is_tried_once(vp9, decoder, monkeypatch, caplog):
    runs = []

    def refuse(self, batch):
        runs.append(len(batch))
        raise RuntimeError("Codec vp9 is not supported by NVDEC on this platform.\nThe pipeline is no longer valid.")

    monkeypatch.setattr(dali._Worker, "_decode", refuse)
    one = decoder()
    for first in range(3):
        one.decode(Clip(str(vp9), first, 1, 9))
    assert runs == [1, 1] and one.on_cpu == 3
    assert "Codec vp9 is not supported" in caplog.text


def test_errors(decoder, tmp_path):
    with pytest.raises(UnreadableVideoError, match="No such file"):
        decoder().decode(Clip(str(tmp_path / "gone.mp4"), 0, 1, 9))
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UnreadableVideoError, match="cannot be opened"):
        decoder().decode(Clip(str(tmp_path / "text.mp4"), 0, 1, 9))


def test_a_hanging_pipeline_is_replaced(vp9, decoder, monkeypatch):
    one = decoder(decode_timeout=0.5)
    hang, run = threading.Event(), dali._Worker._run

    def slow(self, batch):
        if any(request.numbers[0] % 2 for request in batch):
            hang.wait(20)
        return run(self, batch)

    one.decode(Clip(str(vp9), 0, 1, 9))
    monkeypatch.setattr(dali._Worker, "_run", slow)
    started = time.monotonic()
    with pytest.raises(UnreadableVideoError, match=r"was given up: it takes more than 0\.5 s to decode"):
        one.decode(Clip(str(vp9), 1, 1, 9))
    for _ in range(8):  # there are as many pipelines as before
        assert len(one.decode(Clip(str(vp9), 2, 1, 9))) == 9
    assert one.abandoned == 1
    assert time.monotonic() - started < 10
    hang.set()


def test_in_the_loader(vp9, monkeypatch):
    config = small_config(vp9.parent, height=96, width=160, num_frames=9, start_frame_interval=5)
    opened = []

    def build(data, device):
        opened.append(dali.DaliDecoder(data, CPU))
        return opened[-1]

    monkeypatch.setattr(clip_tokens, "build_decoder", build)
    index = index_clips(config.data)
    first, again = read(config, index, steps=6), read(config, index, steps=6)
    assert torch.equal(first, again)
    assert [decoder.on_cpu for decoder in opened] == [0, 0]
