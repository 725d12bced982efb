"""The decoder that a config names."""

import pytest
import torch

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.decode import PyAVDecoder, build_decoder
from cosmos_mcore.data.index import Clip
from cosmos_mcore.data.mp4 import UnreadableVideoError
from tests.videos import read_stamp, write_test_clip


@pytest.mark.parametrize("name", ["auto", "pyav"])
def test_decode(tmp_path, name):
    path = write_test_clip(tmp_path / "clip.mp4", 30)
    frames = build_decoder(DataConfig(decoder=name)).decode(Clip(str(path), 4, 3, 5))
    assert frames.dtype == torch.uint8
    assert frames.shape == (5, 3, 48, 96)
    assert [read_stamp(frame.permute(1, 2, 0).numpy()) for frame in frames] == [4, 7, 10, 13, 16]


def test_vanished_file(tmp_path):
    with pytest.raises(UnreadableVideoError, match="No such file"):
        PyAVDecoder().decode(Clip(str(tmp_path / "clip.mp4"), 0, 1, 9))


def test_unknown_decoder():
    with pytest.raises(ValueError, match="data.decoder=dalí is unknown; known are auto and pyav"):
        build_decoder(DataConfig(decoder="dalí"))
