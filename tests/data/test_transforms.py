"""Resize, crop and normalise, bit by bit as the original."""

import pytest
import torch

from cosmos_mcore.data.transforms import normalize, resize_and_crop


@pytest.fixture
def golden(golden_dir):
    return torch.load(golden_dir / "clip_transform.pt", weights_only=True)


@pytest.mark.parametrize("case", range(5))
def test_golden(golden, case):
    case = golden["cases"][case]
    height, width = case["target"]
    frames = resize_and_crop(case["input"], height, width)
    assert frames.dtype == torch.uint8
    assert torch.equal(frames, case["output_uint8"])
    video = normalize(frames)
    assert video.dtype == torch.float32
    assert torch.equal(video, case["output"].transpose(0, 1))


def test_every_grey_level(golden):
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    try:
        torch.set_default_dtype(torch.bfloat16)  # the original's trap
        video = normalize(levels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(video[0].flatten(), golden["normalise_table_float32"])


@pytest.mark.parametrize(
    ("source", "target", "resized"),
    [
        ((480, 854), (384, 640), (384, 683)),
        ((720, 1280), (640, 848), (640, 1138)),
        ((640, 1024), (384, 640), (400, 640)),
    ],
)
def test_known_sizes(source, target, resized, monkeypatch):
    sizes = []
    interpolate = torch.nn.functional.interpolate

    def spy(frames, size, **options):
        sizes.append(tuple(size))
        return interpolate(frames, size, **options)

    monkeypatch.setattr("cosmos_mcore.data.transforms.F.interpolate", spy)
    frames = resize_and_crop(torch.zeros(1, 3, *source, dtype=torch.uint8), *target)
    assert frames.shape == (1, 3, *target)
    assert sizes == [resized]


def test_same_size_is_untouched():
    frames = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    assert torch.equal(resize_and_crop(frames, 32, 48), frames)
