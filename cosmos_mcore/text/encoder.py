"""The text encoder of the Video2World models: T5's encoder, from local files only (spec/inference.md section 9)."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from cosmos_mcore.config.derived import TEXT_LENGTH, TEXT_WIDTH

logger = logging.getLogger(__name__)

_VERSION = 1  # raise it with every change here that alters embeddings
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ARCHITECTURE = (
    "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size", "feed_forward_proj", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
_BLOCK, _BLOCKS = 2**20, 64  # bytes, and how many of a file of weights are looked at
_LENGTH_STEP = 64  # tokens; batches are padded to a multiple of it


class TextEncoder:
    """Prompts to embeddings. Not thread-safe.

    Attributes:
        fingerprint: see ``fingerprint_of``.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, fingerprint: str) -> None:
        """Takes the parts; see ``from_folder``."""
        self._model, self._tokenizer, self._device, self.fingerprint = model, tokenizer, device, fingerprint

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> TextEncoder:
        """Loads the encoder half of a T5 model.

        Nothing is downloaded and no code of the files is run.

        Args:
            folder: with ``config.json``, ``tokenizer.json`` and weights, as the hub's google-t5/t5-11b has them.
            device: where it runs.
            dtype: of weights and activations; the original computes in float32 and rounds the result.

        Raises:
            ValueError: one line, if the package transformers or a file is missing, or the files are something else.
        """
        fingerprint = fingerprint_of(folder, dtype)
        try:
            import transformers
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                "the text encoder needs the package transformers; install the text extra: pip install '.[text]'"
            ) from None
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{folder / _TOKENIZER} is damaged ({error}); copy or download it again") from None
        tokenizer.enable_truncation(TEXT_LENGTH)
        tokenizer.no_padding()
        try:
            model, found = transformers.T5EncoderModel.from_pretrained(
                folder, local_files_only=True, weights_only=True, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{folder} holds no complete T5 model ({reason}); copy or download it again") from None
        lacking = sorted({*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])})
        if lacking:  # transformers would go on with random numbers
            raise ValueError(f"{folder} lacks {len(lacking)} of the text encoder's weights, for example {lacking[0]}")
        return cls(model.eval().requires_grad_(False).to(device), tokenizer, device, fingerprint)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """Encodes a batch of prompts at once.

        What comes after ``TEXT_LENGTH`` tokens of a prompt is cut off, with a line in the log.

        Returns:
            [B, TEXT_LENGTH, TEXT_WIDTH] in the encoder's dtype, on its device; the rows behind a prompt's last token
            (T5's end mark, which counts as one) are zero.
        """
        encodings = self._tokenizer.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                logger.warning("a prompt has more than %d tokens; cut off: %.60s...", TEXT_LENGTH, prompt)
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings])
        # Padding within the encoder changes nothing, as it is masked there; so as little of it as GPUs like.
        padded = -(-int(lengths.max()) // _LENGTH_STEP) * _LENGTH_STEP
        ids = torch.full((len(prompts), padded), int(self._model.config.pad_token_id or 0))
        for row, encoding in zip(ids, encodings, strict=True):
            row[: len(encoding.ids)] = torch.tensor(encoding.ids)
        mask = (torch.arange(padded) < lengths[:, None]).to(self._device)
        hidden = self._model(input_ids=ids.to(self._device), attention_mask=mask.to(torch.int64)).last_hidden_state
        out = hidden.new_zeros(len(prompts), TEXT_LENGTH, TEXT_WIDTH)
        out[:, :padded] = hidden.masked_fill(~mask[..., None], 0.0)
        return out


def fingerprint_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> str:
    """What the embeddings of an encoder depend on, as 32 hexadecimal digits, without loading it.

    Read are the architecture's numbers, the whole tokenizer, and of each file of weights its size and 64 MiB spread
    evenly from start to end: training changes every tensor, so two encoders differ there.

    Raises:
        ValueError: one line, if a file is missing, or the model is no T5 with embeddings of ``TEXT_WIDTH`` numbers.
    """
    for name in (_CONFIG, _TOKENIZER):
        if not (folder / name).is_file():
            raise ValueError(
                f"there is no text encoder in {folder} ({name} is missing); download google-t5/t5-11b with "
                "scripts/download_autoregressive_checkpoints.py --model_sizes 5B"
            )
    try:
        config = json.loads((folder / _CONFIG).read_text())
        architecture = {name: config.get(name) for name in _ARCHITECTURE}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _CONFIG} is damaged ({error}); copy or download it again") from None
    if config.get("model_type") != "t5" or architecture["d_model"] != TEXT_WIDTH:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')} model of width {architecture['d_model']}; the Video2World "
            f"models read T5 embeddings of width {TEXT_WIDTH}: use google-t5/t5-11b"
        )
    digest = hashlib.sha256(json.dumps([_VERSION, TEXT_LENGTH, str(dtype), architecture]).encode())
    digest.update(hashlib.sha256((folder / _TOKENIZER).read_bytes()).digest())
    for path in _weight_files(folder):
        _hash_parts(path, digest)
    return digest.hexdigest()[:32]


def _weight_files(folder: Path) -> list[Path]:
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        raise ValueError(
            f"{folder} has no weights ({_WEIGHTS[0]} or {_WEIGHTS[2]}); download google-t5/t5-11b with "
            "scripts/download_autoregressive_checkpoints.py --model_sizes 5B"
        )
    if not name.endswith(".json"):
        return [folder / name]
    try:
        paths = [folder / part for part in sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / name} is damaged: it has no weight_map; copy or download it again") from None
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing, which {name} names; copy or download it again")
    return paths


def _hash_parts(path: Path, digest: Any) -> None:
    with open(path, "rb", buffering=0) as file:
        size = path.stat().st_size
        digest.update(str(size).encode())
        count = min(_BLOCKS, -(-size // _BLOCK))
        for number in range(count):
            file.seek(max(0, size - _BLOCK) * number // max(1, count - 1))
            digest.update(file.read(_BLOCK))
