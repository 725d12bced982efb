"""Hundreds of damaged files among good ones: each is named once, training goes on, memory does not grow."""

import random

import psutil
import pytest

from cosmos_mcore.data.index import index_clips
from tests.data.test_loader import open_loader, small_config
from tests.videos import moving_square, write_test_clip

FRAMES = 24
GOOD = 20
BATCH = 8


def truncated(data, draw):
    return data[: draw.randrange(1, len(data) * 9 // 10)]  # of the last tenth, a player misses nothing


def flipped_in_header(data, draw):
    """Wrong bytes all over the index of the file."""
    start = data.index(b"moov")
    return flip(data, start, len(data), 0.05, draw)


def flipped_in_frames(data, draw):
    """Wrong bytes all over the coded frames."""
    start = data.index(b"mdat")
    return flip(data, start, data.index(b"moov"), 0.1, draw)


def flip(data, start, end, share, draw):
    changed = bytearray(data)
    for position in range(start + 4, end):
        if draw.random() < share:
            changed[position] ^= draw.randrange(1, 256)
    return bytes(changed)


def empty(data, draw):
    return b""


def text(data, draw):
    return ("Not a video but a text.\n" * draw.randrange(1, 50)).encode()


KINDS = [truncated, flipped_in_header, flipped_in_frames, empty, text, None]  # None: deleted while training


@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_files(tmp_path, count):
    draw = random.Random(1)
    whole = write_test_clip(tmp_path / "whole" / "0.mp4", FRAMES, draw=moving_square, gop=8).read_bytes()
    folder = tmp_path / "videos"
    folder.mkdir()
    bad, doomed = {}, []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        path = folder / f"{number}_{kind.__name__ if kind else 'deleted'}.mp4"
        path.write_bytes(kind(whole, draw) if kind else whole)
        bad[str(path)] = kind
        doomed += [] if kind else [path]
    good = {str(folder / f"good_{number}.mp4") for number in range(GOOD)}
    for path in good:
        with open(path, "wb") as file:
            file.write(whole)

    config = small_config(folder, global_batch_size=BATCH, start_frame_interval=5)
    index = index_clips(config.data)
    named = {}

    def drain(loader):
        for file in loader.name_skipped(loader.drain_skipped()):
            assert file.path not in named
            named[file.path] = file.reason

    process = psutil.Process()
    with open_loader(config, index) as loader:
        loader.next()
        for path in doomed:
            path.unlink()
        memory = {}
        # Long enough for every clip to come up, which proves all of them; and, in the long run, for 3,000 clips more.
        steps = max(2 * len(index.clips), 3_600 if count >= 500 else 0) // BATCH + 2
        for step in range(steps):
            assert loader.next().ids.shape == (BATCH, 12)
            drain(loader)
            if step * BATCH % 100 < BATCH:
                memory[step * BATCH] = process.memory_info().rss / 2**20
    assert set(named) <= set(bad)
    unnamed = [path for path in bad if path not in named]
    # Nothing in a coded frame, or in an index, tells that some of its bytes are wrong, if they still make sense.
    assert all(bad[path] in (flipped_in_frames, flipped_in_header) for path in unnamed), unnamed
    assert len(unnamed) <= count / 50
    assert all(reason for reason in named.values())
    if count >= 500:
        early, late = (min(memory[i] for i in memory if low <= i < low + 1000) for low in (600, steps * BATCH - 1000))
        print(f"{len(named)} of {count} files named; {steps * BATCH} clips; memory {early:.0f} to {late:.0f} MiB")
        assert late - early < 20
