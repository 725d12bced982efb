"""The demo's clips: what is drawn moves as promised."""

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.data.synthetic import BACKGROUND, CELL, SIZE, SPEED, VELOCITY, Shape, draw_frames, make_shape_clips


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_clips_are_files_that_decode_to_what_was_drawn(tmp_path):
    paths = make_shape_clips(tmp_path / "clips", 3, num_frames=17, height=64, width=96, fps=12, seed=1)
    assert [path.name for path in paths] == ["shapes_0000.mp4", "shapes_0001.mp4", "shapes_0002.mp4"]
    for path in paths:
        frames = decode(path)
        assert frames.shape == (17, 64, 96, 3)
        background = np.abs(frames.astype(int) - BACKGROUND).max(-1) < 8
        assert 0.3 < background.mean() < 0.9


def test_the_seed_decides(tmp_path):
    first, again, other = (make_shape_clips(tmp_path / str(i), 2, 9, seed=seed)[1] for i, seed in enumerate((5, 5, 6)))
    assert np.array_equal(decode(first), decode(again))
    assert not np.array_equal(decode(first), decode(other))


@pytest.mark.parametrize("kind", VELOCITY)
def test_a_shape_moves_one_cell_per_latent_frame_and_wraps(kind):
    height, width = 96, 160
    frames = list(draw_frames([Shape(kind, (255, 255, 255), 2 * CELL, 3 * CELL)], 41, height, width))
    assert frames[0].shape == (height, width, 3)
    for start in range(0, 40, 8):
        moved = np.roll(frames[start], CELL * VELOCITY[kind] // SPEED, axis=1)
        assert np.array_equal(frames[start + 8], moved)
    assert not np.array_equal(frames[0], frames[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 8), st.integers(3, 12), st.integers(0, 2**31), st.integers(1, 6))
def test_shapes_never_touch(rows, columns, seed, count):
    from cosmos_mcore.data.synthetic import _place_shapes

    height, width, frames = rows * CELL, columns * CELL, 33
    shapes = _place_shapes(np.random.default_rng(seed), count, frames, height, width)
    assert 1 <= len(shapes) <= count
    for frame in range(frames):
        covered = np.zeros((height, width), int)
        for shape in shapes:
            covered[np.ix_(shape.top + np.arange(SIZE), (shape.left_at(frame) + np.arange(SIZE)) % width)] += 1
        assert covered.max() == 1


@pytest.mark.parametrize("size", [{"height": 50}, {"width": 32}, {"height": 16}])
def test_sizes_off_the_grid_are_refused(tmp_path, size):
    with pytest.raises(ValueError, match=next(iter(size))):
        make_shape_clips(tmp_path, 1, **size)
    assert not list(tmp_path.iterdir())
