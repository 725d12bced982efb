"""The loader: one stream of clips whatever the layout and the interruptions, and no way to hang."""

import json
import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data import clip_tokens
from cosmos_mcore.data.decode import PyAVDecoder
from cosmos_mcore.data.index import ClipIndex, Clips, SkippedFile, index_clips
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.mp4 import UnreadableVideoError
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.data.transforms import normalize
from cosmos_mcore.text.cache import EmbeddingCache
from cosmos_mcore.tokenizer.build import build_tokenizer
from tests.processes import run_ranks
from tests.text.models import DrawnEncoder, drawn_embedding
from tests.videos import write_test_clip

CPU = torch.device("cpu")


def small_config(path="clips", global_batch_size=4, **data):
    config = RunConfig()
    config.training.global_batch_size = global_batch_size
    small = {"path": str(path), "height": 32, "width": 48, "num_frames": 9, "token_cache": None, "decoder": "pyav"}
    for key, value in {**small, **data}.items():
        setattr(config.data, key, value)
    return config


def open_loader(config, index, rank=0, size=1, consumed=0, tokenizer=None, seed=5, embeddings=None):
    return ClipLoader(
        index,
        ClipSampler(len(index.clips), seed),
        tokenizer or build_tokenizer(config, CPU),
        config,
        derive_video_layout(config),
        data_parallel_rank=rank,
        data_parallel_size=size,
        replica_group=None,
        device=CPU,
        consumed_samples=consumed,
        embeddings=embeddings,
    )


def read(config, index, steps, **where):
    with open_loader(config, index, **where) as loader:
        ids = [loader.next().ids for _ in range(steps)]
    return (
        torch.stack(ids)
        if ids
        else torch.empty(0, config.training.global_batch_size // where.get("size", 1), 12, dtype=torch.int64)
    )


def loader_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clip")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert loader_threads() == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number, frames in enumerate((12, 9, 15)):
        write_test_clip(folder / f"{number}.mp4", frames, 40, 80)
    return folder


class DrawnClips:
    """Stands in for a decoder: every clip another noise, some clips unreadable."""

    name, parallel_clips = "drawn", 1

    def __init__(self, unreadable=(), delay=0.0):
        self.unreadable, self.delay, self.decoded = set(unreadable), delay, []

    def decode(self, clip):
        self.decoded.append(clip)
        time.sleep(self.delay)
        if clip.first_frame in self.unreadable:
            raise UnreadableVideoError(f"frame {clip.first_frame} is damaged")
        draw = torch.Generator().manual_seed(clip.first_frame + 1000 * ord(clip.path[0]))
        return torch.randint(0, 256, (9, 3, 32, 48), dtype=torch.uint8, generator=draw)

    def close(self):
        pass


def drawn(monkeypatch, num_clips, **settings):
    decoder = DrawnClips(**settings)
    monkeypatch.setattr(clip_tokens, "build_decoder", lambda config, device: decoder)
    config = small_config()
    return config, ClipIndex(Clips([("film.mp4", num_clips)], config.data), []), decoder


def test_ids_are_those_of_the_samplers_clips(folder):
    config = small_config(folder, global_batch_size=3)
    index = index_clips(config.data)
    assert len(index.clips) == 4 + 1 + 7
    found = read(config, index, steps=4)
    assert found.shape == (4, 3, 2 * 2 * 3)
    assert found.dtype == torch.int64
    tokenizer = build_tokenizer(config, CPU)
    for ids, number in zip(found.flatten(0, 1), ClipSampler(12, 5).clip_indices(0, 12), strict=True):
        video = normalize(PyAVDecoder(config.data).decode(index.clips[number]))
        assert torch.equal(ids, tokenizer.encode(video[None]).flatten().long())
    assert len(found.flatten(0, 1).unique(dim=0)) >= 7  # the three files begin alike


@settings(max_examples=20)
@given(
    num_clips=st.integers(1, 30),
    replicas=st.sampled_from([1, 2, 4]),
    start=st.integers(0, 100),
    interrupted_after=st.integers(0, 3),
    unreadable=st.sets(st.integers(0, 29), max_size=12),
    num_workers=st.integers(1, 4),
    prefetch_steps=st.integers(0, 3),
)
def test_stream_depends_on_nothing_but_seed_and_position(
    num_clips, replicas, start, interrupted_after, unreadable, num_workers, prefetch_steps
):
    unreadable -= {0}
    with pytest.MonkeyPatch.context() as monkeypatch:
        config, index, _ = drawn(monkeypatch, num_clips, unreadable=unreadable)
        expected = read(config, index, steps=4, consumed=start)
        config.data.num_workers, config.data.prefetch_steps = num_workers, prefetch_steps
        parts = []
        for rank in range(replicas):
            before = read(config, index, interrupted_after, rank=rank, size=replicas, consumed=start)
            resumed = start + 4 * interrupted_after
            after = read(config, index, 4 - interrupted_after, rank=rank, size=replicas, consumed=resumed)
            parts.append(torch.cat([before, after]))
        assert torch.equal(torch.cat(parts, dim=1), expected)


def test_replacement_is_another_readable_clip(monkeypatch):
    config, index, decoder = drawn(monkeypatch, 10, unreadable=[2, 7])
    found = read(config, index, steps=5, seed=0)  # two epochs
    decoder.unreadable.clear()
    whole = read(config, index, steps=5, seed=0)
    changed = [i for i, number in enumerate(ClipSampler(10, 0).clip_indices(0, 20)) if number in (2, 7)]
    differ = (found != whole).flatten(0, 1).any(dim=1)
    assert differ.nonzero().flatten().tolist() == changed
    usable = {tuple(ids) for i, ids in enumerate(whole.flatten(0, 1).tolist()) if i not in changed}
    assert all(tuple(found.flatten(0, 1)[i].tolist()) in usable for i in changed)


def test_each_clip_brings_the_text_of_its_file(monkeypatch, tmp_path):
    config, _, _ = drawn(monkeypatch, 1, unreadable=[2])
    prompts = {"a.mp4": "rain", "b.mp4": "the sun", "c.mp4": "rain"}
    index = ClipIndex(Clips([("a.mp4", 4), ("b.mp4", 3), ("c.mp4", 5)], config.data, prompts), [])
    EmbeddingCache(tmp_path).embed(["rain", "the sun"], DrawnEncoder)
    tokenizer, decoder = build_tokenizer(config, CPU), DrawnClips()
    texts = {
        tuple(tokenizer.encode(normalize(decoder.decode(clip))[None]).flatten().tolist()): prompts[clip.path]
        for clip in index.clips
    }
    assert len(texts) == 12
    with open_loader(config, index, embeddings=EmbeddingCache(tmp_path)) as loader:
        batches = [loader.next() for _ in range(6)]
    for batch in batches:
        assert batch.context.shape == (4, 512, 1024) and batch.context.dtype == torch.bfloat16
        expected = [drawn_embedding(texts[tuple(ids)]) for ids in batch.ids.tolist()]
        assert torch.equal(batch.context, torch.stack(expected))
        assert torch.equal(batch.first(1).context, batch.context[:1]) and len(batch.first(1).ids) == 1
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with (
        open_loader(config, index, embeddings=EmbeddingCache(tmp_path)) as loader,
        pytest.raises(ValueError, match=r"prompt of .\.mp4 is missing or damaged in .*embed_prompts\.py"),
    ):
        loader.next()


def test_a_sample_read_apart_is_that_of_the_steps(monkeypatch):
    config, index, decoder = drawn(monkeypatch, 10, unreadable=[2, 7])
    in_steps = read(config, index, steps=5).flatten(0, 1)
    tokenizer = build_tokenizer(config, CPU)
    with open_loader(config, index) as loader:
        for position, expected in enumerate(in_steps):
            clip, (ids, context) = loader.read(position)
            assert torch.equal(ids[0].long(), expected) and context is None
            assert torch.equal(tokenizer.encode(normalize(decoder.decode(clip))[None]).flatten(1), ids)


def test_an_unreadable_clip_is_tried_once(monkeypatch):
    config, index, decoder = drawn(monkeypatch, 4, unreadable=[1])
    read(config, index, steps=10)
    # Two threads may come to it at the same time.
    assert 1 <= [clip.first_frame for clip in decoder.decoded].count(1) <= config.data.num_workers


def test_consumed_samples_counts_all_replicas(folder):
    config = small_config(folder)
    with open_loader(config, index_clips(config.data), rank=1, size=2, consumed=40) as loader:
        assert loader.consumed_samples == 40
        assert loader.next().ids.shape == (2, 12)
        assert loader.consumed_samples == 44


def test_reads_ahead(monkeypatch):
    config, index, decoder = drawn(monkeypatch, 100)
    config.data.prefetch_steps = 3
    with open_loader(config, index) as loader:
        deadline = time.monotonic() + 20
        while len(decoder.decoded) < 12 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(decoder.decoded) == 12  # and not more, whatever time there is
        loader.next()


def test_clips_are_read_concurrently(monkeypatch):
    config, index, _ = drawn(monkeypatch, 100, delay=0.1)
    config.data.num_workers, config.data.prefetch_steps = 8, 1
    start = time.monotonic()
    read(config, index, steps=4)
    assert time.monotonic() - start < 0.1 * 16


def test_bad_files_are_named_once(folder):
    config = small_config(folder)
    index = index_clips(config.data)
    index.skipped.append(SkippedFile("short.mp4", "has 8 frames, a clip needs 9"))
    clips = Clips([*zip(index.clips._paths, (4, 1, 7), strict=True), (str(folder / "gone.mp4"), 5)], config.data)
    with open_loader(config, ClipIndex(clips, index.skipped)) as loader:
        first = loader.drain_skipped()
        assert SkippedFile("short.mp4", "has 8 frames, a clip needs 9") in first
        for _ in range(10):
            loader.next()
        drained = first + loader.drain_skipped()
        assert loader.drain_skipped() == []
        assert [file.path for file in drained] == ["short.mp4", str(folder / "gone.mp4")]
        assert list(loader.skipped.values()) == drained
        assert loader.name_skipped([*drained, SkippedFile("short.mp4", "by another rank")]) == drained
        assert loader.name_skipped(drained) == []


def test_all_files_vanish(tmp_path):
    paths = [write_test_clip(tmp_path / f"{number}.mp4", 200, 32, 48) for number in range(2)]
    config = small_config(tmp_path, prefetch_steps=1)
    with open_loader(config, index_clips(config.data)) as loader:
        loader.next()
        for path in paths:
            path.unlink()
        start = time.monotonic()
        with pytest.raises(
            ValueError, match=r"no clip can be read any more: all 384 have failed.*\.mp4 \(cannot be op"
        ):
            for _ in range(20):
                loader.next()
        assert time.monotonic() - start < 20


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    config, index, _ = drawn(monkeypatch, 10)
    tokenizer = build_tokenizer(config, CPU)
    monkeypatch.setattr(tokenizer, "encode", lambda video: 1 / 0)
    with open_loader(config, index, tokenizer=tokenizer) as loader:
        for _ in range(3):  # each time, not only the first
            with pytest.raises(ZeroDivisionError):
                loader.next()


def test_close_drops_what_waits(monkeypatch):
    config, index, decoder = drawn(monkeypatch, 100, delay=0.05)
    config.data.prefetch_steps = 50
    start = time.monotonic()
    loader = open_loader(config, index)
    assert loader_threads()
    loader.close()
    loader.close()
    assert loader_threads() == []
    assert time.monotonic() - start < 0.05 * 200 / config.data.num_workers / 2
    assert len(decoder.decoded) < 50


@pytest.mark.parametrize(("ranks", "batch"), [(2, 4), (3, 1)])
def test_ranks_of_a_replica_share_the_work(folder, tmp_path, ranks, batch):
    run_ranks("tests.data.loader_worker", ranks, folder, tmp_path, batch)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    config = small_config(folder, global_batch_size=batch)
    expected = read(config, index_clips(config.data), steps=6, consumed=8).tolist()
    for rank, result in enumerate(found):
        assert result["ids"] == result["same"] == expected
        # Its share, and no clip of the others.
        assert result["consumed_samples"] == 8 + 9 * batch
        ahead = 4 * -(-ranks // batch) * batch  # clips that are read ahead of the 6 steps
        assert 6 * batch / ranks - 1 < len(result["decoded"]) < (6 * batch + ahead) / ranks + 1
        # Rank 0 fails; no other waits for ever, and all know why.
        assert result["error"] == ("AttributeError" if rank == 0 else "RuntimeError")
        assert (
            rank == 0
            or "rank 0 of this model replica cannot read clips any more: AttributeError: 'None" in result["message"]
        )
