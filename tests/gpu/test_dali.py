"""NVDEC through DALI: the same frames as PyAV, of every kind of file that it takes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.decode import PyAVDecoder, build_decoder
from cosmos_mcore.data.index import Clip
from tests.data.test_mp4 import KINDS, OPEN_GOP
from tests.videos import read_stamp, write_test_clip

pytestmark = pytest.mark.gpu
pytest.importorskip("nvidia.dali")

BIG = {"height": 192, "width": 320}
VP9 = {"codec": "libvpx-vp9", "bframes": 0, "codec_options": {"deadline": "realtime", "cpu-used": "8", "b": "2M"}}
CODECS = {
    "hevc": {"codec": "libx265", "codec_options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
    "vp9": VP9,
    "rotated": {"rotation": 90},
    "bt709": {"codec_options": {"colorspace": "bt709"}},
    "open gop hevc": {
        "codec": "libx265",
        "codec_options": {"preset": "medium", "x265-params": f"{OPEN_GOP}:log-level=none"},
    },
}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one.cpu().int() - other.int()).abs().float().mean().item()


@pytest.fixture(scope="module")
def decoder():
    opened = build_decoder(DataConfig(decoder="dali", **BIG), torch.device("cuda", 0))
    yield opened
    opened.close()


@pytest.mark.parametrize("kind", [*KINDS, *CODECS])
def test_exact_frames_of_every_kind(tmp_path: Path, decoder, kind: str) -> None:
    try:
        path = write_test_clip(tmp_path / "clip.mp4", 50, **BIG, **{**KINDS, **CODECS}[kind])
    except ValueError as error:  # this PyAV lacks the encoder
        pytest.skip(str(error))
    pyav = PyAVDecoder(DataConfig(**BIG))
    before = decoder.on_cpu
    clips = [Clip(str(path), first, stride, 9) for first, stride in ((0, 1), (7, 3), (25, 2), (41, 1))]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(decoder.decode, clips))
    by_pyav = decoder.on_cpu - before
    # Whether the GPU's engines know AV1 depends on the GPU; DALI says that an H100's do not.
    assert by_pyav == {"rotated": 4, "mpeg4": 4, "open gop": 2}.get(kind, 0) or (kind, by_pyav) == ("av1", 4)
    for clip, frames in zip(clips, found, strict=True):
        if kind != "rotated":
            assert [read_stamp(frame.permute(1, 2, 0).cpu().numpy()) for frame in frames] == list(clip.frame_numbers)
        assert difference(frames, pyav.decode(clip)) < 2.5  # hard edges of few pixels; natural clips differ less


def test_shared_clips(shared_dir: Path) -> None:
    data = DataConfig(height=384, width=640, decoder="dali")
    decoder, pyav = build_decoder(data, torch.device("cuda", 0)), PyAVDecoder(data)
    for path in sorted((shared_dir / "videos").glob("*.mp4")):
        for first in (0, 27):
            clip = Clip(str(path), first, 1, 33)
            assert difference(decoder.decode(clip), pyav.decode(clip)) < 2
    assert decoder.on_cpu == 0
    decoder.close()
