"""A flat range of a tensor as boxes: each element once, in order."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.checkpoint.pieces import boxes_of_range

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(shapes, st.data())
def test_boxes_hold_the_range_in_its_order(shape, data):
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    whole, found = torch.arange(size).view(shape), []
    for offsets, box in boxes_of_range(shape, start, stop):
        part = whole[tuple(slice(offset, offset + length) for offset, length in zip(offsets, box, strict=True))]
        assert tuple(part.shape) == box
        found += part.flatten().tolist()
    assert found == list(range(start, stop))


@given(st.tuples(st.integers(1, 9), st.integers(1, 9)), st.data())
def test_a_range_of_a_matrix_is_at_most_three_boxes(shape, data):
    start = data.draw(st.integers(0, math.prod(shape)))
    stop = data.draw(st.integers(start, math.prod(shape)))
    assert len(list(boxes_of_range(shape, start, stop))) <= 3
