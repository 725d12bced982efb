"""The diffusion decoder's released files: which they are, and what must be in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cosmos_mcore.checkpoint.torch_file import TorchFile
from cosmos_mcore.inference.diffusion.network import LATENT_CHANNELS, PATCH, DiffusionNetwork, DiffusionSize
from cosmos_mcore.tokenizer import cv8x8x8
from cosmos_mcore.tokenizer.released_file import check_tensors

NETWORK_FOLDER = "Cosmos-Predict1-7B-Decoder-DV8x16x16ToCV8x8x8-720p"
TOKENIZER_FOLDER = "Cosmos-Tokenize1-CV8x8x8-720p"
NETWORK_FILE, TEXT_FILE = "model.pt", "aux_vars.pt"

_OWNER = "the diffusion decoder"
_PREFIX = "net."
_UNUSED = "pos_embedder.seq"  # 0, 1, 2, ...


def missing_files(folder: Path) -> list[Path]:
    """Those of the decoder's files that are not in a folder of released models."""
    network, tokenizer = folder / NETWORK_FOLDER, folder / TOKENIZER_FOLDER
    wanted = [network / NETWORK_FILE, network / TEXT_FILE]
    wanted += [tokenizer / cv8x8x8.DECODER_FILE, tokenizer / cv8x8x8.STATISTICS_FILE]
    return [path for path in wanted if not path.is_file()]


def check_files(folder: Path) -> None:
    """Looks whether all files are there; reads none.

    Raises:
        ValueError: naming those that are missing.
    """
    missing = missing_files(folder)
    if missing:
        raise ValueError(
            f"the diffusion decoder needs {', '.join(map(str, missing))}, which {'is' if len(missing) == 1 else 'are'} "
            "not there; get it with scripts/download_autoregressive_checkpoints.py, name its folder with "
            "--checkpoint_dir, or generate with --disable_diffusion_decoder"
        )


def read_network(folder: Path) -> tuple[DiffusionSize, dict[str, Tensor]]:
    """Reads ``model.pt``.

    Args:
        folder: of released models.

    Returns:
        Size, and the tensors under the names of ``DiffusionNetwork``, mapped from the file, whose checksums fit.

    Raises:
        ValueError: if the file is damaged or not that of this network.
    """
    path = folder / NETWORK_FOLDER / NETWORK_FILE
    file = TorchFile(path)
    content = file.content
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} holds more than named tensors; it is not the file of {_OWNER}")
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in content.items()}
    tensors.pop(_UNUSED, None)
    size = _size(path, tensors)
    with torch.device("meta"):
        check_tensors(path, _OWNER, tensors, DiffusionNetwork(size).state_dict())
    for name, tensor in tensors.items():
        file.check(tensor, name)
    return size, tensors


def read_text(folder: Path) -> Tensor:
    """The embedding [1, M, 1024] of the prompt that the original uses where there is none, from ``aux_vars.pt``.

    Raises:
        ValueError: if the file is damaged or has none.
    """
    path = folder / NETWORK_FOLDER / TEXT_FILE
    file = TorchFile(path)
    text = file.content.get("context") if isinstance(file.content, dict) else None
    if not isinstance(text, Tensor) or text.ndim != 3 or len(text) != 1:
        raise ValueError(f"{path} has no embedding `context` of one prompt; it is not the file of {_OWNER}")
    file.check(text, "context")
    return text


def _size(path: Path, tensors: Mapping[str, Tensor]) -> DiffusionSize:
    """Tells the network's size from its tensors."""
    first = "blocks.block0.blocks."
    names = {
        "input": "x_embedder.proj.1.weight",
        "ids": "token_embedder.weight",
        "head": first + "0.block.attn.to_q.1.weight",
        "text": first + "1.block.attn.to_k.0.weight",
        "adaln": first + "0.adaLN_modulation.1.weight",
    }
    found = {}
    for what, name in names.items():
        tensor = tensors.get(name)
        if tensor is None or tensor.ndim != (1 if what == "head" else 2) or not tensor.numel():
            raise ValueError(f"{path} has no tensor {_PREFIX}{name}; it is not the file of {_OWNER}")
        found[what] = tensor.shape
    channels, numbers = found["input"]
    if numbers != (LATENT_CHANNELS + found["ids"][1] + 1) * PATCH**2:
        raise ValueError(f"{path}: {names['input']} and {names['ids']} do not fit; it is not the file of {_OWNER}")
    return DiffusionSize(
        channels=channels,
        blocks=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        heads=channels // found["head"][0],
        adaln_rank=found["adaln"][0],
        vocab_size=found["ids"][0],
        token_channels=found["ids"][1],
        text_channels=found["text"][1],
    )
