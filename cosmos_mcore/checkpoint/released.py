"""The released models and data on the hub, with their digests (spec/checkpoint.md section 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cosmos_mcore.checkpoint.files import refuse_existing
from cosmos_mcore.checkpoint.hub import Repository, download

_GUARDRAIL = {"guardrail/video_content_safety_filter/safety_filter.pt": "b46dc2ad821fc3b0d946549d7ade19cf"}
_MODEL_FILES = ("README.md", "model.pt", "mean_std.pt", "config.json", "*.jit", "guardrail/*")
_DECODER = "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"


def _nvidia(name: str, md5: dict[str, str], patterns: tuple[str, ...] = ("*",)) -> Repository:
    return Repository(f"nvidia/{name}", name, patterns, md5)


def _model(name: str, md5: str) -> Repository:
    return _nvidia(name, {"model.pt": md5, **_GUARDRAIL}, _MODEL_FILES)


MODELS = {
    "4B": _model("Cosmos-Predict1-4B", "5fdc62fc87fbf470dbcc2288589b7942"),
    "5B": _model("Cosmos-Predict1-5B-Video2World", "2a48a854bb6e04abb6b7c72979f1a69b"),
    "12B": _model("Cosmos-Predict1-12B", "ed748fabcb544d30d35385a8c28efb4d"),
    "13B": _model("Cosmos-Predict1-13B-Video2World", "21a9fb02c61fbebc96c1af1fcaa5893f"),
}
# What generation and training need beside any of the models.
COMMON = (
    _nvidia(
        _DECODER,
        {
            "aux_vars.pt": "29e450d81839e82bb4bdbf12e43a74f1",
            "model.pt": "a30149cc3730f3142b01fd374b6076f8",
            **_GUARDRAIL,
        },
    ),
    _nvidia(
        "Cosmos-Tokenize1-CV8x8x8-720p",
        {
            "autoencoder.jit": "7f658580d5cf617ee1a1da85b1f51f0d",
            "decoder.jit": "ff21a63ed817ffdbe4b6841111ec79a8",
            "encoder.jit": "f5834d03645c379bc0f8ad14b9bc0299",
            "mean_std.pt": "f07680ad7eefae57d698778e2a0c7c96",
        },
    ),
    _nvidia(
        "Cosmos-Tokenize1-DV8x16x16-720p",
        {
            "autoencoder.jit": "606b8585b637f06057725cbb67036ae6",
            "decoder.jit": "f0c8a9d992614a43e7ce24ebfc901e26",
            "encoder.jit": "95186b0410346a3f0cf250b76daec452",
        },
    ),
)
# The text encoder, which only the Video2World models read: 90 GB in two copies, of which one is enough.
TEXT_ENCODER = Repository(
    "google-t5/t5-11b",
    "google-t5/t5-11b",
    ("*.json", "spiece.model", "pytorch_model.bin", "README.md"),
    {"pytorch_model.bin": "f890878d8a162e0045a25196e27089a3"},
)
_TEXT_MODELS = ("5B", "13B")

DATASET = Repository("nvidia/Cosmos-NeMo-Assets", ".", ("*.mp4*",), repo_type="dataset")
_DATASET_FOLDER, _VIDEOS = "nemo_diffusion_example_data", "videos"


def download_models(sizes: Sequence[str], root: Path) -> list[Path]:
    """Downloads the models of the given sizes and what they need.

    Args:
        sizes: of ``MODELS``, in any case.
        root: the folder that gets one folder per repository.

    Returns:
        The folders.

    Raises:
        ValueError: one line, for an unknown size or a failed download.
    """
    known = [size.upper() for size in sizes]
    wrong = next((size for size in known if size not in MODELS), None)
    if wrong is not None:
        raise ValueError(f"--model_sizes {wrong} is unknown; known: {' '.join(MODELS)}")
    repositories = [MODELS[size] for size in known] + list(COMMON)
    if any(size in _TEXT_MODELS for size in known):
        repositories.append(TEXT_ENCODER)
    return [download(repository, root) for repository in repositories]


def download_dataset(root: Path) -> Path:
    """Downloads the example clips to ``root/videos``, ready for ``data.path``.

    Returns:
        That folder.

    Raises:
        ValueError: one line, if the download fails or brings no clip.
    """
    videos = root / _VIDEOS
    if videos.is_dir() and any(videos.glob("*.mp4")):
        return videos
    download(DATASET, root)
    arrived = root / _DATASET_FOLDER
    if not arrived.is_dir() or not any(arrived.glob("*.mp4")):
        raise ValueError(f"{DATASET.repo_id} brought no MP4 files to {arrived}")
    if videos.is_dir() and not any(videos.iterdir()):
        videos.rmdir()
    refuse_existing([videos], force=False)
    os.replace(arrived, videos)
    return videos
