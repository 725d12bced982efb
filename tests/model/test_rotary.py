"""3-D rotary angles, YaRN included."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.model.presets import PRESETS, ModelArch, Yarn
from cosmos_mcore.model.rotary import axis_dims, inverse_frequencies, rotary_angles, yarn_frequencies


@pytest.mark.parametrize(("head_dim", "dims"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (32, (12, 10, 10))])
def test_channels_of_each_axis(head_dim, dims):
    assert axis_dims(head_dim) == dims


def naive_angle(arch, position, channel):
    """The angle of one position (t, h, w) at one channel of the first half, in float64 and without YaRN."""
    dims = axis_dims(arch.kv_channels)
    for coordinate, dim in zip(position, dims, strict=True):
        if channel < dim // 2:
            return coordinate / arch.rotary_base ** (2 * channel / dim)
        channel -= dim // 2
    raise AssertionError("more channels than half a head")


@given(
    st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)), st.sampled_from([16, 30, 64, 128]), st.data()
)
def test_any_angle_is_what_the_formula_says(shape, head_dim, data):
    arch = ModelArch(num_layers=1, hidden_size=64, kv_channels=head_dim)
    angles = rotary_angles(arch, shape)
    assert angles.shape == (math.prod(shape), 1, 1, head_dim) and angles.dtype == torch.float32
    t, h, w = (data.draw(st.integers(0, size - 1)) for size in shape)
    channel = data.draw(st.integers(0, head_dim // 2 - 1))
    row = angles[(t * shape[1] + h) * shape[2] + w, 0, 0]  # width is innermost
    assert row[channel].item() == pytest.approx(naive_angle(arch, (t, h, w), channel), rel=1e-5)
    assert torch.equal(row[: head_dim // 2], row[head_dim // 2 :])


def test_begin_of_video_row_and_padding_do_not_turn():
    arch, shape = PRESETS["tiny"], (2, 3, 4)
    plain = rotary_angles(arch, shape)
    shifted = rotary_angles(arch, shape, begin_of_video=True)
    assert len(shifted) == 25
    assert not shifted[0].any()
    assert torch.equal(shifted[1:], plain)
    padded = rotary_angles(arch, shape, begin_of_video=True, padded_length=32)
    assert torch.equal(padded[:25], shifted)
    assert padded.shape[0] == 32 and not padded[25:].any()
    assert torch.equal(rotary_angles(arch, shape, padded_length=26)[:24], plain)


@pytest.mark.parametrize("preset", ["12b", "13b-video2world"])
def test_yarn_of_the_large_models(preset):
    arch = PRESETS[preset]
    temporal, spatial = (inverse_frequencies(dim, arch.rotary_base) for dim in axis_dims(arch.kv_channels)[:2])
    assert len(temporal) == 22 and len(spatial) == 21
    assert torch.equal(yarn_frequencies(temporal, arch.yarn, 3), temporal / 2)
    factors = (yarn_frequencies(spatial, arch.yarn, 40) / spatial).tolist()
    assert factors == pytest.approx([1.0, 0.9013, 0.6374] + [0.5] * 18, abs=5e-5)
    # Height and width share the table for 40 rows; no magnitude scale.
    angles = rotary_angles(arch, (2, 2, 2))[-1, 0, 0, :64]
    assert angles.tolist() == pytest.approx(torch.cat((temporal / 2, *[spatial * torch.tensor(factors)] * 2)).tolist())


def test_yarn_keeps_fast_frequencies_and_slows_slow_ones():
    yarn = Yarn(scale=4.0, beta_fast=8.0, beta_slow=2.0)
    per_turn = 2 * math.pi / 100
    frequencies = torch.tensor([9.0, 8.0, 5.0, 2.0, 1.0]) * per_turn  # turns within 100 positions
    scaled = yarn_frequencies(frequencies, yarn, 100) / frequencies
    assert scaled.tolist() == pytest.approx([1.0, 1.0, 0.625, 0.25, 0.25], rel=1e-5)
