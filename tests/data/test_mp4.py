"""Random access to frames: exact in every kind of file, and one error for whatever is wrong."""

import io
import random

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.data.mp4 import Mp4File, UnreadableVideoError, probe
from tests.videos import moving_square, read_stamp, stamped, write_test_clip

FRAMES = 50
OPEN_GOP = "open-gop=1:bframes=3:b-adapt=0:keyint=10:min-keyint=10:scenecut=0"
KINDS = {
    "b-frames": {},
    "no b-frames": {"bframes": 0},
    "b-pyramid": {"bframes": 3, "codec_options": {"preset": "medium", "b-pyramid": "normal"}},
    "keyframes only": {"gop": 1},
    "one keyframe": {"gop": 1000},
    "open gop": {"codec_options": {"preset": "medium", "x264-params": OPEN_GOP}},
    "variable frame rate": {"timestamps": [round(16 * i + 60 * np.sin(i / 5)) + 300 for i in range(FRAMES)]},
    "late start": {"timestamps": [1000 + 16 * i for i in range(FRAMES)]},
    "no edit list": {"container_options": {"use_editlist": "0"}},
    "fragmented": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "mpeg4": {"codec": "mpeg4", "codec_options": {}},
    "av1": {"codec": "libsvtav1", "bframes": 0, "codec_options": {"preset": "12"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mp4")


@pytest.fixture(scope="module", params=KINDS)
def clip(request, folder):
    """A file of ``FRAMES`` frames, and all of them as decoded from the start."""
    path = write_test_clip(folder / f"{request.param}.mp4", FRAMES, **KINDS[request.param])
    return path, decode_everything(path)


@pytest.fixture(scope="module")
def plain(folder):
    """The bytes of a file whose index stands in front, so that it can be cut off."""
    path = write_test_clip(folder / "plain.mp4", FRAMES, container_options={"movflags": "faststart"})
    return path.read_bytes()


def decode_everything(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def cut(source, target, frames_before):
    """Copies packets so that the presentation starts ``frames_before`` frames later, amid a group of pictures."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        shift = round(frames_before / (stream.average_rate * stream.time_base))
        copy = new.add_stream_from_template(stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                new.mux(packet)
    return target


def test_every_frame_of_every_kind(clip):
    path, everything = clip
    assert [read_stamp(frame) for frame in everything] == list(range(FRAMES))
    for first in range(FRAMES):
        numbers = range(first, min(first + 7, FRAMES), 3)
        with Mp4File(path) as file:
            assert file.num_frames == FRAMES
            assert np.array_equal(file.read(numbers), everything[numbers.start : numbers.stop : 3]), first


@settings(max_examples=15)
@given(numbers=st.sets(st.integers(0, FRAMES - 1), min_size=1).map(sorted))
def test_any_increasing_numbers(clip, numbers):
    path, everything = clip
    with Mp4File(path) as file:
        assert np.array_equal(file.read(numbers), everything[numbers])


def frames_of_cut(path, numbers):
    """What another program makes of the file that ``cut`` gives, which must show all frames from the first one on."""
    with Mp4File(path) as file:
        data, places, _ = file.cut(numbers)
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(data) < path.stat().st_size + 2000
    return np.stack([frames[place] for place in places])


def test_cut_of_every_kind(clip):
    path, everything = clip
    for first in range(0, FRAMES, 3):
        numbers = range(first, min(first + 7, FRAMES), 3)
        assert np.array_equal(frames_of_cut(path, numbers), everything[numbers.start : numbers.stop : 3]), first


def test_open_groups_of_pictures_are_known(folder):
    for name, options in (("open", KINDS["open gop"]), ("closed", {"gop": 10})):
        with Mp4File(write_test_clip(folder / f"{name}.mp4", FRAMES, **options)) as file:
            found = [file.cut([first]).at_recovery_point for first in (0, 25)]
        assert found == [False, name == "open"]


@pytest.mark.parametrize("frames_before", [5, 17])
def test_edit_list(folder, frames_before):
    whole = write_test_clip(folder / "whole.mp4", FRAMES)
    path = cut(whole, folder / f"cut_{frames_before}.mp4", frames_before)
    everything = decode_everything(path)
    assert [read_stamp(frame) for frame in everything] == list(range(frames_before, FRAMES))
    for first in range(len(everything) - 3):
        with Mp4File(path) as file:
            assert file.num_frames == len(everything)
            assert np.array_equal(file.read(range(first, first + 3)), everything[first : first + 3])
        assert np.array_equal(frames_of_cut(path, range(first, first + 3)), everything[first : first + 3])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("h264", "yuv420p", 64, 96, 0, "unspecified")),
        ({"rotation": 90}, ("h264", "yuv420p", 64, 96, 90, "unspecified")),
        ({"codec_options": {"colorspace": "bt709"}}, ("h264", "yuv420p", 64, 96, 0, "bt709")),
        ({"codec": "libsvtav1", "bframes": 0, "codec_options": {"preset": "12"}}, ("av1", "yuv420p", 64, 96, 0)),
        ({"codec": "libvpx-vp9", "bframes": 0, "codec_options": {}}, ("vp9", "yuv420p", 64, 96, 0)),
        ({"codec": "libx265", "codec_options": {"x265-params": "log-level=none"}}, ("hevc", "yuv420p", 64, 96, 0)),
    ],
)
def test_probe(tmp_path, options, expected):
    path = write_test_clip(tmp_path / "clip.mp4", 3, 64, 96, **options)
    assert probe(path)[: len(expected)] == expected


def test_probe_of_damaged_files(tmp_path):
    with pytest.raises(UnreadableVideoError, match="No such file"):
        probe(tmp_path / "gone.mp4")


def test_start_is_never_too_late(clip):
    """Whatever libav makes of a request to seek: this keyframe is shown no later than the frame."""
    path, _ = clip
    with av.open(str(path)) as container:
        shown = [packet.pts for packet in container.demux(video=0) if packet.pts is not None]
    places = [sorted(shown).index(timestamp) for timestamp in shown]
    with Mp4File(path) as file:
        starts = [file._start_entry(frame) for frame in range(FRAMES)]
    assert all(places[start] <= frame for frame, start in enumerate(starts))


def test_seeks_instead_of_decoding_from_the_start(folder):
    path = write_test_clip(folder / "long.mp4", 200, gop=10)
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for packet in list(container.demux(video=0))[20:120]:
            data[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    path.write_bytes(data)
    with Mp4File(path) as file:  # nothing between is touched, so it may be destroyed
        assert [read_stamp(frame) for frame in file.read([150, 152])] == [150, 152]
    with Mp4File(path) as file, pytest.raises(UnreadableVideoError):
        file.read([50, 52])


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_turned_upright(folder, rotation):
    path = write_test_clip(folder / f"turned_{rotation}.mp4", 3, draw=moving_square, rotation=rotation)
    with Mp4File(path) as file:
        frame = file.read([2])[0].astype(int)
    upright = np.rot90(moving_square(2, 48, 96), k=rotation // 90).astype(int)
    assert frame.shape == upright.shape
    assert abs(frame - upright).mean() < 4


def test_colours(folder):
    path = write_test_clip(folder / "colours.mp4", 2, draw=moving_square)
    with Mp4File(path) as file:
        frame = file.read([0])[0]
    assert abs(frame[20, 8].astype(int) - (220, 40, 30)).max() < 12
    assert abs(frame[40, 80].astype(int) - (40, 60, 90)).max() < 12


def test_cut_off_file_keeps_its_beginning(folder, plain):
    path = folder / "cut_off.mp4"
    path.write_bytes(plain[: len(plain) * 6 // 10])
    with Mp4File(path) as file:
        count = file.num_frames
        assert FRAMES // 4 < count < FRAMES
        numbers = range(count - 6)  # the decoder cannot show the last ones
        assert [read_stamp(frame) for frame in file.read(numbers)] == list(numbers)
    with Mp4File(path) as file, pytest.raises(UnreadableVideoError, match="frame .* is (missing|damaged)"):
        file.read(range(count, count + 3))


def test_damaged_inside(folder, plain):
    """Noise amid the data is an error, or at worst pictures that look damaged; never another kind of exception."""
    path, draw = folder / "noise.mp4", random.Random(0)
    outcomes = set()
    for attempt in range(60):
        data = bytearray(plain)
        for _ in range(draw.choice((1, 20, 200))):
            data[draw.randrange(len(data) if attempt % 2 else 2500)] = draw.randrange(256)
        path.write_bytes(data)
        try:
            with Mp4File(path) as file:
                if file.num_frames >= 4:
                    assert file.read(range(file.num_frames - 4, file.num_frames)).shape[0] == 4
                    outcomes.add("read")
        except UnreadableVideoError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "cannot be opened"), (b"not a video" * 100, "cannot be opened"), (None, "No such file")],
)
def test_no_video_at_all(tmp_path, content, words):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnreadableVideoError, match=words):
        Mp4File(path)


def test_frame_beyond_the_end(folder):
    path = write_test_clip(folder / "short.mp4", 5)
    with Mp4File(path) as file, pytest.raises(UnreadableVideoError, match="frame 5 is missing"):
        file.read([3, 5])


def test_stamps_can_fail():
    assert read_stamp(stamped(1234, 48, 96)) == 1234 != read_stamp(stamped(1235, 48, 96))
