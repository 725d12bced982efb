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
    decoder = build_decoder(DataConfig(decoder=name, height=48, width=96), torch.device("cpu"))
    assert decoder.name == "pyav"
    frames = decoder.decode(Clip(str(path), 4, 3, 5))
    assert frames.dtype == torch.uint8
    assert frames.shape == (5, 3, 48, 96)
    assert [read_stamp(frame.permute(1, 2, 0).numpy()) for frame in frames] == [4, 7, 10, 13, 16]


def test_vanished_file(tmp_path):
    with pytest.raises(UnreadableVideoError, match="No such file"):
        PyAVDecoder(DataConfig()).decode(Clip(str(tmp_path / "clip.mp4"), 0, 1, 9))


def test_frames_have_the_target_size(tmp_path):
    path = write_test_clip(tmp_path / "clip.mp4", 9, 48, 96)
    decoder = PyAVDecoder(DataConfig(height=32, width=32))
    assert decoder.decode(Clip(str(path), 0, 1, 9)).shape == (9, 3, 32, 32)


def test_decoding_that_takes_too_long_is_given_up(tmp_path):
    path = write_test_clip(tmp_path / "clip.mp4", 60, gop=60)
    with pytest.raises(UnreadableVideoError, match=r"was given up: it takes more than 1e-06 s to decode"):
        PyAVDecoder(DataConfig(decode_timeout=1e-6)).decode(Clip(str(path), 40, 1, 9))


def test_dali_without_a_gpu(caplog):
    with pytest.raises(ValueError, match="data.decoder=dali does not work here: there is no GPU"):
        build_decoder(DataConfig(decoder="dali"), torch.device("cpu"))
    with caplog.at_level("INFO"):
        build_decoder(DataConfig(), torch.device("cpu"))
    assert "decoding with PyAV on the CPU: there is no GPU" in caplog.text
