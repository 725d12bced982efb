"""The cache in the loader and offline: the same ids as on the spot, nothing decoded twice, training without videos."""

import errno
import json
import os
import shutil
import subprocess
import sys

import av
import pytest
import torch

from cosmos_mcore.config.load import to_yaml
from cosmos_mcore.data.decode import PyAVDecoder
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.shards import record_bytes
from cosmos_mcore.data.token_cache import cached_keys
from cosmos_mcore.data.tokenize_videos import main
from tests.data.test_loader import open_loader, read, small_config
from tests.processes import ROOT, environment
from tests.videos import write_test_clip


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for number, frames in enumerate((12, 9, 15)):
        write_test_clip(folder / "below" / f"{number}.mp4", frames, 40, 80)
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """The clips that are decoded."""
    clips, decode = [], PyAVDecoder.decode
    monkeypatch.setattr(PyAVDecoder, "decode", lambda self, clip: (clips.append(clip), decode(self, clip))[1])
    return clips


def test_the_same_ids_cold_warm_resumed_and_without_cache(videos, tmp_path, decoded):
    config = small_config(videos)
    index = index_clips(config.data)
    expected = read(config, index, steps=9)
    config.data.token_cache = str(tmp_path / "cache")
    config.data.prefetch_steps = 1
    cold = read(config, index, steps=9)
    decoded.clear()
    warm = read(config, index, steps=9)
    assert decoded == []
    resumed = torch.cat([read(config, index, steps=4), read(config, index, steps=5, consumed=16)])
    assert all(torch.equal(ids, expected) for ids in (cold, warm, resumed))
    size = record_bytes(12) + 28
    assert len(cached_keys(tmp_path / "cache")) == 12
    stored = [path.stat().st_size for path in (tmp_path / "cache").glob("*.i*")]
    assert 12 * size <= sum(stored) <= 18 * size  # two threads may have made a clip of two epochs at once


def test_a_second_epoch_decodes_nothing(videos, tmp_path, decoded):
    config = small_config(videos, token_cache=str(tmp_path / "cache"), prefetch_steps=1, num_workers=1)
    index = index_clips(config.data)
    with open_loader(config, index) as loader:
        loader._clip_tokens.cache._refreshed = -100.0
        for _ in range(12 // 4 + 1):
            loader.next()
    decoded.clear()
    read(config, index, steps=12)
    assert decoded == []


def test_a_changed_or_vanished_file_is_not_served_from_the_cache(videos, tmp_path):
    config = small_config(videos, token_cache=str(tmp_path / "cache"))
    index = index_clips(config.data)
    before = read(config, index, steps=3)
    write_test_clip(videos / "below" / "0.mp4", 12, 80, 40)
    after = read(config, index, steps=3)
    assert not torch.equal(before, after)
    config.data.token_cache = None
    assert torch.equal(after, read(config, index, steps=3))
    (videos / "below" / "2.mp4").unlink()
    without = read(config, index, steps=3)
    config.data.token_cache = str(tmp_path / "cache")
    with open_loader(config, index) as loader:
        assert torch.equal(torch.stack([loader.next().ids for _ in range(3)]), without)
        assert "No such file" in loader.drain_skipped()[0].reason


def yaml_of(config, folder):
    path = folder / "config.yaml"
    path.write_text(to_yaml(config))
    return str(path)


def test_offline_then_from_the_cache_alone(videos, tmp_path, decoded, capsys):
    config = small_config(videos)
    expected = read(config, index_clips(config.data), steps=9)
    (videos / "broken.mp4").write_bytes(b"no video")
    damaged = videos / "damaged.mp4"  # its first frame is sound, so only decoding tells
    write_test_clip(damaged, 9, 40, 80, gop=4, bframes=0)
    with av.open(str(damaged)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(damaged.read_bytes())
    for position, size in packets[5:]:
        content[position : position + size] = bytes(size)
    damaged.write_bytes(content)
    cache, config.data.token_cache = tmp_path / "cache", "auto"
    command = [yaml_of(config, tmp_path), "--output", str(cache)]
    assert main([*command, "--part", "0/3"]) == 0
    parts = [
        subprocess.Popen(
            [sys.executable, "scripts/tokenize_videos.py", *command], cwd=ROOT, env=environment(RANK=r, WORLD_SIZE="3")
        )
        for r in ("1", "2")
    ]
    assert [part.wait(120) for part in parts] == [0, 0]
    decoded.clear()
    assert main(command) == 0  # there is nothing left to do
    assert {clip.path for clip in decoded} == {str(damaged)}
    decoded.clear()
    assert "0 clips tokenized, 12 were there, 2 files dropped; the cache has 12 of 13 clips" in capsys.readouterr().out
    lines = [json.loads(line) for line in (cache / "manifest.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["dropped"] for line in lines if "dropped" in line}
    assert set(reasons) == {str(videos / "broken.mp4"), str(damaged)}
    assert "cannot be decoded" in reasons[str(damaged)] or "is damaged" in reasons[str(damaged)]
    assert len([line for line in lines if "first_frame" in line]) == 12

    shutil.rmtree(videos)
    moved = cache.rename(tmp_path / "moved")
    config.data.path = str(moved)
    index = index_clips(config.data)
    assert torch.equal(read(config, index, steps=9), expected)
    assert decoded == []
    config.data.start_frame_interval = 4
    assert [clip.first_frame for clip in index_clips(config.data).clips] == [0, 0, 0, 4]
    config.data.height = 48
    with pytest.raises(ValueError, match=r"was made with data\.height=32, this run has data\.height=48"):
        index_clips(config.data)


def test_without_room_the_offline_tool_ends_and_goes_on_later(videos, tmp_path, decoded, monkeypatch):
    """It would decode and tokenize all the rest for nothing."""
    command = [yaml_of(small_config(videos, token_cache="auto", num_workers=1), tmp_path), "--output"]
    command.append(str(tmp_path / "cache"))

    def append(writer, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("cosmos_mcore.data.shards.ShardWriter.append", append)
        with pytest.raises(ValueError, match="cache takes no more ids; make room and run the same command again"):
            main(command)
    assert len(decoded) < 12 and not (tmp_path / "cache" / "manifest.jsonl").exists()
    assert main(command) == 0
    assert len(cached_keys(tmp_path / "cache")) == 12


@pytest.mark.parametrize("name", ["dropped-0of1.incomplete", "manifest.jsonl"])
def test_notes_that_cannot_be_written_are_one_line(videos, tmp_path, name):
    (tmp_path / "cache" / name).mkdir(parents=True)
    command = [yaml_of(small_config(videos, token_cache="auto"), tmp_path), "--output", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match=r"the token cache \S+/cache cannot be written \(Is a directory\); make room"):
        main(command)


def test_a_record_that_is_gone_is_an_unreadable_clip(videos, tmp_path):
    config = small_config(videos, token_cache=str(tmp_path / "cache"))
    read(config, index_clips(config.data), steps=3)
    config.data.path = config.data.token_cache
    index = index_clips(config.data)
    for path in (tmp_path / "cache").glob("*.ids"):
        content = bytearray(path.read_bytes())
        content[30] ^= 1
        path.write_bytes(content)
    with open_loader(config, index) as loader:
        for _ in range(3):
            loader.next()
        assert "no longer in the token cache" in loader.drain_skipped()[0].reason


def test_mistakes(videos, tmp_path):
    config = small_config(videos, token_cache="auto")
    path = yaml_of(config, tmp_path)
    with pytest.raises(ValueError, match="give --output FOLDER"):
        main([path])
    assert main([path, "--output", str(tmp_path / "c")]) == 0
    with pytest.raises(ValueError, match="--part 3/3 must be I/N"):
        main([path, "--output", str(tmp_path / "d"), "--part", "3/3", "--merge", str(tmp_path / "c")])
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match=r"was made with data\.num_frames=9, this run has data\.num_frames=1\b"):
        main([path, "--output", str(tmp_path / "c"), "data.num_frames=1", "model.num_condition_latents=0"])
