"""FSQ against the original's numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.tokenizer import fsq


@pytest.fixture
def golden(golden_dir):
    return torch.load(golden_dir / "fsq.pt", weights_only=True)


def test_constants(golden):
    assert list(fsq.LEVELS) == list(golden["levels"])
    assert list(fsq.BASIS) == list(golden["basis"])
    assert fsq.VOCAB_SIZE == 64000


def test_quantize(golden):
    ids = fsq.quantize(golden["z"])
    assert ids.dtype == torch.int32
    assert torch.equal(ids, golden["indices"])
    assert torch.equal(fsq.ids_to_digits(ids), golden["digits"])
    codes = fsq.ids_to_codes(ids)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, golden["codes"])


def test_codes_in_both_layouts(golden):
    assert torch.equal(fsq.ids_to_codes(golden["flat_indices"], dim=-1), golden["flat_codes"])
    assert torch.equal(fsq.ids_to_codes(golden["grid_indices"]), golden["grid_codes"])


def test_default_dtype_and_autocast_change_nothing(golden):
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fsq.quantize(golden["z"]), golden["indices"])
            assert torch.equal(fsq.ids_to_codes(golden["indices"]), golden["codes"])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("id_", "codes"),
    [
        (0, [-1] * 6),
        (1, [-0.75] + [-1] * 5),
        (7, [0.75] + [-1] * 5),
        (8, [-1, -0.75] + [-1] * 4),
        (63999, [0.75] * 3 + [1] * 3),
    ],
)
def test_known_ids(id_, codes):
    assert fsq.ids_to_codes(torch.tensor([id_]), dim=-1).tolist() == [codes]


def test_every_id_has_its_own_digits():
    ids = torch.arange(fsq.VOCAB_SIZE)
    digits = fsq.ids_to_digits(ids)
    assert torch.equal(fsq.digits_to_ids(digits), ids.int())
    assert (digits >= 0).all() and (digits < torch.tensor(fsq.LEVELS)).all()


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6))
def test_thresholds(z):
    """Each digit counts the thresholds of spec/tokenizer.md section 3 that lie below z."""
    eight, five = (-1.423, -0.792, -0.437, -0.144, 0.150, 0.505, 1.136), (-0.971, -0.255, 0.255, 0.972)
    digits = fsq.ids_to_digits(fsq.quantize(torch.tensor([z])))[0]
    for value, digit, thresholds in zip(z, digits, [eight] * 3 + [five] * 3, strict=True):
        if min(abs(value - threshold) for threshold in thresholds) > 1e-3:  # they are rounded in the text
            assert digit == sum(value > threshold for threshold in thresholds)


@pytest.mark.parametrize("shape", [(1, 6), (2, 6, 3), (2, 6, 1, 4, 5)])
def test_any_number_of_axes(shape):
    assert fsq.quantize(torch.zeros(shape, dtype=torch.bfloat16)).shape == shape[:1] + shape[2:]
