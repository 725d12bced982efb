"""Puts a safetensors export on the Hugging Face hub, with a model card."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from cosmos_mcore.checkpoint.architecture import describe, preset_name
from cosmos_mcore.checkpoint.hub import require_hub
from cosmos_mcore.checkpoint.hub_files import open_safetensors
from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.checkpoint.reader import Checkpoint
from cosmos_mcore.checkpoint.released import MODELS

_CARD = "README.md"
_BLOCK = 2**24  # bytes read at a time
_LICENSE = "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license"


def push(folder: Path, repo_id: str, private: bool = True) -> str:
    """Uploads a folder that ``write_safetensors`` has made.

    A ``README.md`` in the folder is the model card; if there is none, one is written.

    Args:
        folder: the export.
        repo_id: ``owner/name``; made if it is not there.
        private: whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        ValueError: one line, if the export is not complete or the hub refuses.
    """
    checkpoint = open_safetensors(folder)
    hub = require_hub()
    if not (folder / _CARD).exists():
        (folder / _CARD).write_text(model_card(checkpoint, folder, repo_id))
    api = hub.HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=["*.safetensors", "*.json", _CARD],
            commit_message="Upload with cosmos_mcore",
        )
    except hub.errors.HFValidationError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    except (OSError, RuntimeError, *hub.errors.HfHubHTTPError.__bases__) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"HTTP {status}" if status else type(error).__name__
        raise ValueError(
            f"{repo_id} could not be written ({reason}); log in with `hf auth login` and a token with write access"
        ) from None
    return str(address)


def model_card(checkpoint: Checkpoint, folder: Path, repo_id: str) -> str:
    """The text of a model card: what it is, sizes, digests, how to load it."""
    arch, name = checkpoint.arch, preset_name(checkpoint.arch)
    size = name.split("-")[0].upper() if name else ""
    base = [f"base_model: {MODELS[size].repo_id}"] if size in MODELS else []
    shapes = original_shapes(arch)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    files = "\n".join(f"| {path.name} | {_sha256(path)} |" for path in sorted(folder.glob("*.safetensors")))
    header = [
        "---",
        *base,
        "library_name: cosmos_mcore",
        "license: other",
        "license_name: nvidia-open-model-license",
        f"license_link: {_LICENSE}",
        "tags: [cosmos, video-generation, autoregressive, megatron-core]",
        "---",
    ]
    title = repo_id.split("/")[-1]
    kind = "text, image or video" if arch.text_to_video else "image or video"
    body = f"""
# {title}

An autoregressive model that continues a video from {kind}: Cosmos-Predict1's architecture, trained with cosmos_mcore.

| | |
|---|---|
| model | {describe(arch)} |
| parameters | {parameters:,} in {len(shapes)} tensors ({checkpoint.dtype(checkpoint.names[0])}) |
| layers, width | {arch.num_layers}, {arch.hidden_size} |
| attention heads, query groups, head size | {arch.num_attention_heads}, {arch.num_query_groups}, {arch.kv_channels} |
| vocabulary | {arch.vocab_size:,} video tokens |

## Use

    hf download {repo_id} --local-dir {title}
    python scripts/convert_checkpoint.py --input {title} --output model.pt --to monolithic

`checkpoint.load: {title}` in a run's YAML trains from it directly. `model.pt` is the layout of cosmos-predict1.

## SHA-256

| file | digest |
|---|---|
{files}
"""
    return "\n".join(header) + "\n" + body


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
