"""Parking of weights; test_pipeline.py and tests/gpu show generation with it."""

import pytest
import torch

from cosmos_mcore.inference.offload import Parking


def test_nothing_stays_where_there_is_no_room_for_all():
    tensors = tuple(torch.full((4,), float(number)) for number in range(3))
    parking = Parking(tensors)
    with parking.present():
        assert [tensor.tolist() for tensor in tensors] == [[number] * 4 for number in range(3)]
    parking._parked[1] = torch.zeros(5)  # a copy that fails, as one without memory would
    with pytest.raises(RuntimeError), parking.present():
        raise AssertionError("not all are there")
    assert [tensor.untyped_storage().nbytes() for tensor in tensors] == [0, 0, 0]
