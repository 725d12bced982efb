"""Images are clips of one frame."""

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_mcore.data.images import check_image, read_image
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.mp4 import UnreadableVideoError
from tests.data.test_loader import read, small_config
from tests.videos import write_test_clip


@pytest.fixture
def folder(tmp_path):
    write_test_clip(tmp_path / "a.mp4", 3, 32, 48)
    frame = np.zeros((40, 80, 3), np.uint8)
    frame[:, :40] = (250, 20, 10)
    Image.fromarray(frame).save(tmp_path / "b.PNG")
    Image.fromarray(frame).rotate(90, expand=True).save(tmp_path / "c.jpg", exif=turned())
    (tmp_path / "d.jpeg").write_bytes(b"no image")
    return tmp_path


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # a viewer turns it by 90 degrees clockwise
    return exif


def test_images_and_frames_of_videos_mix(folder, tmp_path):
    config = small_config(folder, num_frames=1, token_cache=str(tmp_path / "cache"))
    config.model.num_condition_latents = 0
    index = index_clips(config.data)
    names = [clip.path.rsplit("/")[-1] for clip in index.clips]
    assert names == ["a.mp4", "a.mp4", "a.mp4", "b.PNG", "c.jpg"]
    assert [file.path.rsplit("/")[-1] for file in index.skipped] == ["d.jpeg"]
    first, again = read(config, index, steps=3), read(config, index, steps=3)
    assert first.shape == (3, 4, 6)
    assert torch.equal(first, again)


def test_videos_do_not_mix_with_images(folder):
    index = index_clips(small_config(folder, num_frames=3).data)
    assert [clip.path for clip in index.clips] == [str(folder / "a.mp4")]
    assert index.skipped == []


def test_read(folder):
    straight, turned_back = read_image(folder / "b.PNG"), read_image(folder / "c.jpg")
    assert straight.shape == turned_back.shape == (1, 40, 80, 3)
    assert abs(straight.astype(int) - turned_back.astype(int)).mean() < 3
    grey = folder / "e.png"
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(grey)
    assert read_image(grey)[0, 0, 0].tolist() == [156] * 3


def test_damaged(folder):
    for function in (read_image, check_image):
        with pytest.raises(UnreadableVideoError):
            function(folder / "d.jpeg")
        with pytest.raises(UnreadableVideoError, match="No such file"):
            function(folder / "gone.png")
    path = folder / "b.PNG"
    path.write_bytes(path.read_bytes()[:80])
    with pytest.raises(UnreadableVideoError, match="cannot be read"):
        read_image(path)
