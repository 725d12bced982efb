"""The token cache: what was written is found by all, and what was torn, evicted or made otherwise is not."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data import token_cache
from cosmos_mcore.data.contents import FileContents
from cosmos_mcore.data.mp4 import UnreadableVideoError
from cosmos_mcore.data.shards import ClipKey, record_bytes
from cosmos_mcore.data.token_cache import TokenCache, cache_folder, cache_settings, cached_keys, merge
from tests.processes import ROOT, environment

TOKENS = 50
SETTINGS = {"data.height": 32, "data.width": 48, "tokens per clip": TOKENS, "tokenizer": "t", "data.decoder": "pyav"}


def key(number):
    return ClipKey(number.to_bytes(16, "big"), number % 7)


def clip_ids(number):
    return np.random.default_rng(number).integers(0, 64000, TOKENS, dtype=np.uint16)


def fill(folder, numbers, limit=float("inf")):
    cache = TokenCache(folder, SETTINGS, limit)
    for number in numbers:
        cache.add(key(number), clip_ids(number))
    cache.close()


def check(folder, numbers):
    """All of ``numbers`` are there as they were written."""
    cache = TokenCache(folder, SETTINGS)
    for number in numbers:
        assert np.array_equal(cache.find(key(number)), clip_ids(number)), number
    cache.close()


def test_found_by_the_next_process_and_by_a_running_one(tmp_path, monkeypatch):
    other = TokenCache(tmp_path, SETTINGS)
    fill(tmp_path, range(20))
    check(tmp_path, range(20))
    monkeypatch.setattr(token_cache, "_REFRESH_SECONDS", 0)
    assert np.array_equal(other.find(key(3)), clip_ids(3))
    assert other.find(ClipKey(key(3).content, 4)) is None
    other.close()


@settings(max_examples=40)
@given(data=st.data())
def test_no_torn_or_changed_record_is_ever_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    fill(folder, range(6))
    path = data.draw(st.sampled_from(sorted([*folder.glob("*.ids"), *folder.glob("*.idx")])))
    content = bytearray(path.read_bytes())
    cut = data.draw(st.integers(0, len(content)))
    if data.draw(st.booleans()):
        content = content[:cut]
    elif cut < len(content):
        content[cut] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    cache = TokenCache(folder, SETTINGS)
    found = {number: cache.find(key(number)) for number in range(6)}
    assert all(ids is None or np.array_equal(ids, clip_ids(number)) for number, ids in found.items())
    if path.suffix == ".ids" and len(content) == 6 * record_bytes(TOKENS):
        assert sum(ids is None for ids in found.values()) <= 1
    cache.close()
    fill(folder, range(6))  # the next process mends it
    check(folder, range(6))


def test_many_processes_and_kill_9(tmp_path):
    command = [sys.executable, "-m", "tests.data.cache_worker", str(tmp_path)]
    options = {"cwd": ROOT, "env": environment(), "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(i), str(clips)], **options) for i, clips in enumerate((0, 0, 40))]
    done = {}
    for number in (0, 1):
        for _ in range(30):
            done[number] = int(workers[number].stdout.readline())
        workers[number].send_signal(signal.SIGKILL)
        done[number] = int((workers[number].communicate()[0].split() or [done[number]])[-1])
    assert workers[2].wait(60) == 0
    workers[2].stdout.close()
    # What a process has said to be done is there; of what it was doing when killed, all or nothing.
    check(tmp_path, [*range(done[0]), *range(10**6, 10**6 + done[1]), *range(2 * 10**6, 2 * 10**6 + 40)])
    assert len(cached_keys(tmp_path)) - done[0] - done[1] - 40 in (0, 1, 2)


def test_eviction_keeps_to_the_limit_and_drops_what_was_used_longest_ago(tmp_path):
    limit = 100 * (record_bytes(TOKENS) + 28)
    for part in range(4):
        fill(tmp_path, range(25 * part, 25 * part + 25), limit)
    for age, path in enumerate(sorted(tmp_path.glob("*.ids"), reverse=True)):
        os.utime(path, (time.time() - 1000 * (age + 1),) * 2)
    cache = TokenCache(tmp_path, SETTINGS, limit)
    assert cache.find(key(3)) is not None  # the oldest is used now
    for number in range(200, 260):
        cache.add(key(number), clip_ids(number))
    size = sum(path.stat().st_size for pattern in ("*.ids", "*.idx") for path in tmp_path.glob(pattern))
    assert size <= limit * 9 / 8
    cache.close()
    left = {int.from_bytes(found.content, "big") for found in cached_keys(tmp_path)}
    assert set(range(200, 250)) <= left
    assert 3 in left and 30 not in left


def test_an_evicted_file_is_a_miss_and_can_be_filled_again(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache, "_REFRESH_SECONDS", 0)
    fill(tmp_path, range(3))
    cache = TokenCache(tmp_path, SETTINGS)
    for path in [*tmp_path.glob("*.ids"), *tmp_path.glob("*.idx")]:
        path.unlink()
    assert cache.find(key(1)) is None
    cache.add(key(1), clip_ids(1))
    assert np.array_equal(cache.find(key(1)), clip_ids(1))
    cache.close()


def test_other_settings_are_refused_by_name(tmp_path):
    fill(tmp_path, [1])
    for name, value in (("data.height", 64), ("tokenizer", "other"), ("data.decoder", "dali")):
        with pytest.raises(ValueError, match=f"was made with {name}={SETTINGS[name]}, this run has {name}={value}"):
            TokenCache(tmp_path, {**SETTINGS, name: value})
    TokenCache(tmp_path, {**SETTINGS, "data.decoder": "dali"}, writable=False).close()  # nothing is decoded then
    (tmp_path / "token_cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"token_cache\.json cannot be read"):
        TokenCache(tmp_path, SETTINGS)


def test_everything_that_changes_ids_is_a_setting():
    def settings_of(**changes):
        config = RunConfig()
        for name, value in changes.items():
            setattr(config.data, name, value)
        return cache_settings(config, derive_video_layout(config), "t", "pyav")

    assert settings_of() == settings_of(start_frame_interval=5, num_workers=9)
    for change in ({"height": 384}, {"width": 640}, {"num_frames": 17}, {"frame_stride": 2}):
        assert settings_of(**change) != settings_of()
    assert set(settings_of()) >= {"tokenizer", "data.decoder", "transform version"}


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("OUTPUT_ROOT", "/out")
    config = RunConfig()
    default = cache_folder(config, {"a": 1})
    assert str(default).startswith("/out/posttraining/autoregressive_base/unnamed/token_cache/33x640x848-")
    assert cache_folder(config, {"a": 2}) != default
    config.data.token_cache = str(tmp_path / "c")
    assert cache_folder(config, {"a": 2}) == tmp_path / "c"
    config.data.token_cache = None
    assert cache_folder(config, {}) is None


def test_processes_of_one_number_on_two_nodes_make_a_cache_at_once(tmp_path, monkeypatch):
    written, replace = threading.Barrier(2), os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (written.wait(5), replace(*paths)))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: TokenCache(tmp_path / "cache", SETTINGS), range(2)))
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [token_cache.SETTINGS_FILE]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made \(Not a directory\); set data\.token_cache"):
        TokenCache(tmp_path / "file" / "cache", SETTINGS)


def test_a_full_disk_ends_the_keeping_not_the_run(tmp_path, monkeypatch, caplog):
    cache = TokenCache(tmp_path, SETTINGS)
    cache.add(key(1), clip_ids(1))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for number in range(2, 6):
        cache.add(key(number), clip_ids(number))
    monkeypatch.undo()
    assert caplog.text.count("takes no more ids ([Errno 28] No space left on device)") == 1
    cache.close()
    check(tmp_path, [1])


def test_merge(tmp_path):
    fill(tmp_path / "a", range(5))
    fill(tmp_path / "b", range(5, 9))
    assert merge(tmp_path / "a", tmp_path / "c") == 2
    assert merge(tmp_path / "b", tmp_path / "c") == 2
    assert merge(tmp_path / "b", tmp_path / "c") == 0
    with pytest.raises(ValueError, match=r"/d is no token cache: it has no token_cache\.json$"):
        merge(tmp_path / "d", tmp_path / "c")
    check(tmp_path / "c", range(9))
    TokenCache(tmp_path / "d", {**SETTINGS, "data.height": 16}).close()
    with pytest.raises(ValueError, match=r"data\.height"):
        merge(tmp_path / "a", tmp_path / "d")


def test_a_merge_without_room_is_one_line(tmp_path, monkeypatch):
    fill(tmp_path / "a", range(5))

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"the token cache \S+/b cannot be written \(No space left on device\); make"):
        merge(tmp_path / "a", tmp_path / "b")


def test_contents_of_large_files_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("cosmos_mcore.data.contents._BLOCK", 4)
    (tmp_path / "cache").mkdir()
    found = set()
    data = bytes(range(256)) * 2
    for number in range(0, 260, 20):  # up to 64 blocks of 4 bytes, every byte counts
        changed = bytearray(data[:256])
        if number < 256:
            changed[number] ^= 1
        (tmp_path / "a").write_bytes(changed)
        found.add(FileContents(tmp_path / "cache").of(str(tmp_path / "a")))
    for size in (0, 1, 3, 255, 257, 400, 511, 512):
        (tmp_path / "a").write_bytes(data[:size])
        found.add(FileContents(tmp_path / "cache").of(str(tmp_path / "a")))
    for position in (0, 508, 511):
        changed = bytearray(data)
        changed[position] ^= 1
        (tmp_path / "a").write_bytes(changed)
        found.add(FileContents(tmp_path / "cache").of(str(tmp_path / "a")))
    assert len(found) == 13 + 8 + 3


def test_contents_follow_the_files(tmp_path, monkeypatch):
    cache, a, b = tmp_path / "cache", tmp_path / "a.mp4", tmp_path / "b.mp4"
    cache.mkdir()
    a.write_bytes(b"one")
    b.write_bytes(b"one")
    contents = FileContents(cache)
    first = contents.of(str(a))
    assert len(first) == 16 and contents.of(str(b)) == first
    a.write_bytes(b"two!")
    assert contents.of(str(a)) != first
    again = FileContents(cache)
    assert again.paths() == contents.paths()
    monkeypatch.setattr("cosmos_mcore.data.contents._hash", lambda path: 1 / 0)
    assert again.of(str(b)) == first  # not hashed again
    monkeypatch.undo()
    for notes in cache.glob("files-*"):
        notes.write_bytes(notes.read_bytes() + b'{"path": "torn')
    assert FileContents(cache).paths() == contents.paths()
    b.unlink()
    with pytest.raises(UnreadableVideoError, match="No such file"):
        again.of(str(b))
    assert json.loads(next(cache.glob("files-*")).read_bytes().split(b"\n")[0])["size"] == 3
