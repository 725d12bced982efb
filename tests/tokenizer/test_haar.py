"""The training-free tokenizer: its interface, causality, and that its pictures can be recognised."""

import hashlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.data.mp4 import Mp4File
from cosmos_mcore.data.transforms import normalize, resize_and_crop
from cosmos_mcore.tokenizer.haar import HaarTokenizer

COLOURS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "grey": (128, 128, 128),
    "red": (230, 30, 30),
    "green": (30, 200, 60),
    "blue": (40, 80, 240),
    "yellow": (250, 220, 30),
    "magenta": (230, 40, 220),
    "cyan": (30, 220, 230),
    "orange": (255, 140, 20),
}


def psnr(one, other):
    return -10 * math.log10((((one - other) / 2) ** 2).mean().item())


def square_clip(frames=33, height=96, width=160, colour=(230, 30, 30), ground=(20, 24, 40), speed=2):
    """[1, 3, T, H, W]: a square of 40 pixels that moves to the right."""
    video = torch.tensor(ground).view(3, 1, 1, 1).repeat(1, frames, height, width)
    for frame in range(frames):
        left = 16 + speed * frame
        video[:, frame, 24:64, left : left + 40] = torch.tensor(colour).view(3, 1, 1)
    return (video / 127.5 - 1)[None]


def random_video(frames, height=32, width=48, batch=2, seed=0):
    return torch.rand(batch, 3, frames, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def tokenizer():
    return HaarTokenizer(33)


@pytest.mark.parametrize("frames", [1, 9, 17, 33, 66])
def test_shapes(tokenizer, frames):
    ids = tokenizer.encode(random_video(frames))
    chunk = min(frames, 33)
    assert ids.shape == (2, frames // chunk * (1 + (chunk - 1) // 8), 2, 3)
    assert ids.dtype == torch.int32
    assert ids.min() >= 0 and ids.max() < tokenizer.vocab_size
    video = tokenizer.decode(ids)
    assert video.shape == (2, 3, frames, 32, 48)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1


def test_one_frame_chunks_are_images():
    images = HaarTokenizer(1)
    video = random_video(5)
    ids = images.encode(video)
    assert ids.shape[1] == 5
    for frame in range(5):
        assert torch.equal(ids[:, frame : frame + 1], images.encode(video[:, :, frame : frame + 1]))
    assert images.decode(ids).shape == video.shape


@given(st.integers(1, 5), st.integers(0, 100))
def test_causal_in_both_directions(latents, seed):
    tokenizer = HaarTokenizer(33)
    video = random_video(33, seed=seed)
    ids = tokenizer.encode(video)
    frames = 8 * latents - 7
    assert torch.equal(tokenizer.encode(video[:, :, :frames]), ids[:, :latents])
    assert torch.equal(tokenizer.decode(ids[:, :latents]), tokenizer.decode(ids)[:, :, :frames])


def test_chunks_and_samples_are_independent(tokenizer):
    one, other = random_video(33, seed=1), random_video(33, seed=2)
    both = tokenizer.encode(torch.cat([one, other], dim=2))
    assert torch.equal(both, torch.cat([tokenizer.encode(one), tokenizer.encode(other)], dim=1))
    assert torch.equal(tokenizer.encode(one[:1]), tokenizer.encode(one)[:1])
    assert torch.equal(tokenizer.decode(both)[:, :, 33:], tokenizer.decode(both[:, 5:]))


def test_any_ids_decode(tokenizer):
    ids = torch.randint(0, 64000, (1, 5, 3, 4), generator=torch.Generator().manual_seed(0))
    assert tokenizer.decode(ids).isfinite().all()


@pytest.mark.parametrize("name", COLOURS)
def test_flat_colours_survive(tokenizer, name):
    video = (torch.tensor(COLOURS[name]) / 127.5 - 1).view(1, 3, 1, 1, 1).expand(1, 3, 9, 32, 32)
    decoded = tokenizer.decode(tokenizer.encode(video))
    assert (decoded - decoded[:, :, :1, :1, :1]).abs().max() < 1e-5  # flat stays flat, and still stays still
    seen = (decoded[0, :, 0, 0, 0] + 1) * 127.5
    distances = {other: math.dist(seen.tolist(), rgb) for other, rgb in COLOURS.items()}
    assert min(distances, key=distances.__getitem__) == name, distances


@pytest.mark.parametrize("name", ["red", "green", "blue", "yellow", "magenta", "cyan", "orange", "white"])
@pytest.mark.parametrize("ground", [(20, 24, 40), (235, 235, 230)])
def test_moving_shapes_are_recognisable(tokenizer, name, ground):
    if name == "white" and ground[0] > 200:
        pytest.skip("white on white")
    video = square_clip(colour=COLOURS[name], ground=ground)
    decoded = tokenizer.decode(tokenizer.encode(video))
    for frame in (0, 16, 32):
        inside = (decoded[0, :, frame, 34:54, 26 + 2 * frame : 46 + 2 * frame].mean((1, 2)) + 1) * 127.5
        distances = {other: math.dist(inside.tolist(), rgb) for other, rgb in COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == name, (frame, inside)
        truth = video[0, :, frame]
        assert psnr(decoded[0, :, frame], truth) > psnr(truth.mean((1, 2), keepdim=True).expand_as(truth), truth) + 6


def test_shift_by_a_cell_shifts_the_ids(tokenizer):
    video = square_clip()
    ids = tokenizer.encode(video)
    assert torch.equal(tokenizer.encode(video.roll(16, dims=-1)), ids.roll(1, dims=-1))


def test_mid_grey_is_not_a_tie(tokenizer):
    """The mean lies halfway between two steps of luma; a rounding error must not decide."""
    grey = torch.zeros(1, 3, 1, 16, 16)
    assert len({tokenizer.encode(grey + noise).item() for noise in (-2e-6, 0, 2e-6)}) == 1


def test_dtypes(tokenizer):
    video = square_clip(9)
    exact = torch.round(video * 64) / 64  # exact in bfloat16, too
    assert torch.equal(tokenizer.encode(exact.bfloat16()), tokenizer.encode(exact))
    try:
        torch.set_default_dtype(torch.bfloat16)
        ids = tokenizer.encode(video)
        decoded = tokenizer.decode(ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ids, tokenizer.encode(video))
    assert torch.equal(decoded, tokenizer.decode(ids.long()))


def test_fingerprint_pins_the_ids(tokenizer):
    """If this fails because the method changed, raise ``_VERSION`` and put both new values here."""
    ids = torch.cat([tokenizer.encode(square_clip(colour=colour)) for colour in COLOURS.values()])
    digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    assert (tokenizer.fingerprint, digest) == ("haar-v1-chunk33", "c284b67c2a52de1c")
    assert HaarTokenizer(17).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((1, 3, 8, 32, 32), "8 frames cannot be encoded"),
        ((1, 3, 41, 32, 32), "41 frames cannot be encoded"),
        ((1, 3, 0, 32, 32), "0 frames cannot be encoded"),
        ((1, 3, 9, 40, 32), "40x32"),
        ((3, 9, 32, 32), r"must be \[B, 3, T, H, W\]"),
        ((1, 1, 9, 32, 32), r"must be \[B, 3, T, H, W\]"),
    ],
)
def test_wrong_videos(tokenizer, shape, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.encode(torch.zeros(shape))


@pytest.mark.parametrize(("shape", "words"), [((1, 6, 2, 2), "6 latent frames"), ((5, 2, 2), r"\[B, T, H, W\]")])
def test_wrong_ids(tokenizer, shape, words):
    with pytest.raises(ValueError, match=words):
        tokenizer.decode(torch.zeros(shape, dtype=torch.int32))


def test_real_clip(shared_dir, tokenizer):
    with Mp4File(shared_dir / "videos" / "clip_0.mp4") as file:
        frames = torch.from_numpy(file.read(range(9))).permute(0, 3, 1, 2)
    video = normalize(resize_and_crop(frames, 384, 640))[None]
    decoded = tokenizer.decode(tokenizer.encode(video))
    assert psnr(decoded, video) > 26.5
