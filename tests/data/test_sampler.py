"""The endless stream of clip numbers."""

from itertools import islice

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cosmos_mcore.data.sampler import ClipSampler, WeightedSampler

sizes, seeds = st.integers(1, 40), st.integers(0, 2**31)


@given(sizes, seeds)
def test_each_epoch_holds_every_clip_once(num_clips, seed):
    sampler = ClipSampler(num_clips, seed)
    for epoch in range(3):
        assert sorted(sampler.clip_indices(epoch * num_clips, num_clips)) == list(range(num_clips))


def test_epochs_and_seeds_differ():
    sampler = ClipSampler(50, 0)
    epochs = [sampler.clip_indices(50 * epoch, 50) for epoch in range(4)]
    epochs.append(ClipSampler(50, 9).clip_indices(0, 50))
    assert len({tuple(epoch) for epoch in epochs}) == 5


@given(sizes, seeds, st.integers(0, 200), st.lists(st.integers(0, 15), max_size=8))
def test_starts_anywhere_and_in_any_pieces(num_clips, seed, first, counts):
    expected = ClipSampler(num_clips, seed).clip_indices(0, first + sum(counts))[first:]
    sampler, found = ClipSampler(num_clips, seed), []
    for count in counts:
        found += sampler.clip_indices(first + len(found), count)
    assert found == expected


def test_first_epoch_is_the_originals():
    """PyTorch's own DistributedSampler, as the original uses it with four replicas of batch 1."""
    streams = [
        list(torch.utils.data.DistributedSampler(range(20), num_replicas=4, rank=rank, shuffle=True, seed=0))
        for rank in range(4)
    ]
    found = ClipSampler(20, 0).clip_indices(0, 20)
    for rank, stream in enumerate(streams):
        assert found[rank::4] == stream


def test_order_is_pinned():
    """A resumed run must meet the same order under another torch version."""
    assert ClipSampler(10, 3).clip_indices(5, 10) == [5, 1, 9, 2, 4, 0, 4, 9, 6, 7]


@given(sizes, seeds, st.integers(0, 1000))
def test_replacements_try_every_clip_once(num_clips, seed, position):
    replacements = list(ClipSampler(num_clips, seed).replacements(position))
    assert sorted(replacements) == list(range(num_clips))
    assert list(ClipSampler(num_clips, seed).replacements(position)) == replacements


def test_replacements_differ_from_position_to_position():
    sampler = ClipSampler(1000, 0)
    assert len({tuple(islice(sampler.replacements(position), 2)) for position in range(50)}) > 40


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.001, 100), min_size=4, max_size=4),
    seed=st.integers(0, 5),
    start=st.integers(0, 25_000),
)
@example(sizes=[1, 1, 1, 1], weights=[1.0, 36.0, 0.001, 0.001], seed=0, start=0)
def test_weighted_sources(sizes, weights, seed, start):
    weights = weights[: len(sizes)]
    sampler = WeightedSampler(sizes, weights, seed)
    found = sampler.clip_indices(start, 300)
    other = WeightedSampler(sizes, weights, seed)
    assert [other.clip_indices(position, 1)[0] for position in (start + 299, start, start + 7)] == [
        found[299],
        found[0],
        found[7],
    ]
    assert all(0 <= number < sum(sizes) for number in found)


def test_weights_are_shares_and_each_source_passes_through_all_its_clips():
    sizes, weights = [7, 100, 1], [3, 1, 1]
    found = WeightedSampler(sizes, weights, seed=3).clip_indices(0, 20_000)
    sources = [[number for number in found if low <= number < high] for low, high in ((0, 7), (7, 107), (107, 108))]
    assert [len(source) for source in sources] == [12_000, 4_000, 4_000]
    for source, size in zip(sources, sizes, strict=True):
        assert all(len(set(source[i : i + size])) == size for i in range(0, len(source) - size, size))
    head = [number < 7 for number in found[:1000]]
    assert 500 < sum(head) < 700  # mixed, not one after the other
