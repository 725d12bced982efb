"""Which clips a folder holds, what is skipped, and the errors for a wrong path."""

import os
import pickle
import subprocess
import sys
import time

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.index import Clip, Clips, SkippedFile, find_files, index_clips
from tests.processes import environment
from tests.videos import write_audio_only, write_test_clip


def config(path, **settings):
    return DataConfig(path=path if isinstance(path, list) else str(path), **{"num_frames": 9, **settings})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two usable files, one in a folder below, and one of each kind of bad file."""
    folder = tmp_path_factory.mktemp("videos")
    write_test_clip(folder / "b.mp4", 12)
    write_test_clip(folder / "a" / "c.MP4.mp4", 10).rename(folder / "a" / "c.MP4")
    write_test_clip(folder / "short.mp4", 8)
    write_audio_only(folder / "audio.mp4")
    (folder / "broken.mp4").write_bytes(b"\x00" * 1000)
    (folder / "empty.mp4").touch()
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / ".half_written.mp4").write_bytes(b"")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "part.mp4").write_bytes(b"")
    (folder / "notes.txt").write_text("no video")
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")  # opening it would wait for ever
    return folder


def test_clips_and_skipped_files(folder):
    start = time.monotonic()
    index = index_clips(config(folder))
    assert time.monotonic() - start < 1
    clips = [("a/c.MP4", 0), ("a/c.MP4", 1), ("b.mp4", 0), ("b.mp4", 1), ("b.mp4", 2), ("b.mp4", 3)]
    assert list(index.clips) == [Clip(str(folder / name), first, 1, 9) for name, first in clips]
    reasons = {os.path.relpath(file.path, folder): file.reason for file in index.skipped}
    assert sorted(reasons) == ["audio.mp4", "broken.mp4", "empty.mp4", "gone.mp4", "short.mp4"]
    assert reasons["short.mp4"] == "has 8 frames, a clip needs 9"
    assert reasons["audio.mp4"] == "has no video stream"
    assert "No such file" in reasons["gone.mp4"]


def test_clips_with_prompts(folder, tmp_path):
    lines = [f'{{"visual_input": "{folder}/{name}", "prompt": "{name}"}}' for name in ("b.mp4", "short.mp4")]
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    index = index_clips(config(folder, prompts=str(tmp_path / "all.jsonl")), text=True)
    assert list(index.clips) == [Clip(str(folder / "b.mp4"), first, 1, 9, prompt="b.mp4") for first in range(4)]
    reasons = {os.path.relpath(file.path, folder): file.reason for file in index.skipped}
    assert sorted(reasons) == ["a/c.MP4", "audio.mp4", "broken.mp4", "empty.mp4", "gone.mp4", "short.mp4"]
    assert reasons["a/c.MP4"] == f"has no prompt in {tmp_path / 'all.jsonl'}"
    assert reasons["short.mp4"] == "has 8 frames, a clip needs 9"
    assert pickle.loads(pickle.dumps(index)).clips[3] == index.clips[3]  # rank 0 sends it to the others
    with pytest.raises(ValueError, match="none of the 7 videos has a prompt; the first, .*c.MP4, has no prompt"):
        index_clips(config(folder), text=True)


def test_damaged_first_frame_is_found_at_once(tmp_path):
    path = write_test_clip(tmp_path / "clip.mp4", 12, gop=100)
    with av.open(str(path)) as container:
        first = next(container.demux(video=0))
    data = bytearray(path.read_bytes())
    data[first.pos + 8 : first.pos + first.size] = bytes(first.size - 8)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="none of the 1 MP4 files is usable; the first, .*clip.mp4, frame"):
        index_clips(config(tmp_path))


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=5),
    num_frames=st.integers(1, 12),
    stride=st.integers(1, 4),
    interval=st.integers(1, 10),
)
def test_enumeration(lengths, num_frames, stride, interval):
    """As spec/data.md section 2: every start whose last frame still lies in the file."""
    settings = config("x", num_frames=num_frames, frame_stride=stride, start_frame_interval=interval)
    expected = [
        (str(file), start)
        for file, length in enumerate(lengths)
        for start in range(0, length, interval)
        if start + (num_frames - 1) * stride <= length - 1
    ]
    span = (num_frames - 1) * stride + 1
    usable = [(str(i), (length - span) // interval + 1) for i, length in enumerate(lengths) if length >= span]
    clips = Clips(usable, settings)
    assert [(clip.path, clip.first_frame) for clip in clips] == expected
    assert len(clips) == len(expected)
    assert all(len(clip.frame_numbers) == num_frames for clip in clips)
    if expected:
        assert clips[-1] == clips[len(clips) - 1]
        assert clips[1:3] == list(clips)[1:3]
    with pytest.raises(IndexError):
        clips[len(clips)]


def test_strided_clips_of_a_file(tmp_path):
    path = write_test_clip(tmp_path / "clip.mp4", 40)
    clips = index_clips(config(path, frame_stride=3, start_frame_interval=5)).clips
    assert [clip.first_frame for clip in clips] == [0, 5, 10, 15]
    assert clips[1].frame_numbers == range(5, 32, 3)


def test_order_is_by_path_below_the_folder(tmp_path):
    names = ["b.mp4", "a/z.mp4", "a.mp4", "B.mp4", "a/b/c.mp4"]
    for root in ("one", "another"):
        for name in names if root == "one" else reversed(names):
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / name).touch()
    found = [[os.path.relpath(path, root) for path in find_files(config(root))] for root in tmp_path.iterdir()]
    assert found[0] == found[1] == sorted(names)


def test_list_of_paths(tmp_path):
    for name in ("x/1.mp4", "x/2.mp4", "y/0.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = [str(tmp_path / "y"), str(tmp_path / "x" / "2.mp4"), str(tmp_path / "x")]
    found = [os.path.relpath(path, tmp_path) for path in find_files(config(paths))]
    assert found == ["y/0.mp4", "x/2.mp4", "x/1.mp4"]
    (tmp_path / "z").mkdir()
    with pytest.raises(ValueError, match=r"/z holds no \.mp4 file"):
        find_files(config([*paths, str(tmp_path / "z")]))
    (tmp_path / "z" / "token_cache.json").touch()
    with pytest.raises(ValueError, match="/z is a token cache, which cannot be one of several entries"):
        find_files(config([*paths, str(tmp_path / "z")]))


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "clip.mp4").touch()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "data")
    assert find_files(config(tmp_path / "data")) == [str(tmp_path / "data" / "link" / "clip.mp4")]


def test_wrong_paths(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"data.path=missing does not exist \\({tmp_path}/missing\\)"):
        index_clips(config("missing"))
    with pytest.raises(ValueError, match=r"holds no \.mp4 file"):
        index_clips(config(tmp_path))
    with pytest.raises(ValueError, match="is not an MP4 file"):
        index_clips(config(folder / "notes.txt"))
    with pytest.raises(
        ValueError, match="none of the 2 MP4 files is usable; the first, .*broken.mp4, cannot be opened"
    ):
        index_clips(config([str(folder / "broken.mp4"), str(folder / "short.mp4")]))


def test_skipped_file_is_a_value():
    assert SkippedFile("a", "b") == SkippedFile("a", "b")


def test_without_torch():
    """A wrong path is reported before the seconds that torch takes to load."""
    code = "import sys, cosmos_mcore.data.index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60).returncode == 0


def test_weights(tmp_path):
    write_test_clip(tmp_path / "a" / "1.mp4", 12)
    write_test_clip(tmp_path / "b" / "2.mp4", 9)
    paths = [str(tmp_path / "a"), str(tmp_path)]  # the second one holds the first one's files, too
    assert index_clips(config(paths, weights=[1.0, 2.0])).source_sizes == [4, 1]
    assert index_clips(config(paths)).source_sizes is None
    with pytest.raises(ValueError, match=r"/b/2\.mp4 has a weight but no usable clip; leave both out"):
        index_clips(config([str(tmp_path), str(tmp_path / "b" / "2.mp4")], weights=[1.0, 2.0]))
