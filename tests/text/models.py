"""Text encoders for tests: a tiny T5 on disk, and one that is none."""

from __future__ import annotations

import hashlib

import torch

WORDS = ("a", "the", "robot", "arm", "car", "moves", "left", "right", "lifts", "red", "box", "turns", "rain", "sun")


class DrawnEncoder:
    """Stands in for ``TextEncoder``: embeddings that are a function of the prompt alone, a row for each letter."""

    def __init__(self, fingerprint="drawn"):
        self.fingerprint, self.encoded = fingerprint, []

    def __call__(self, prompts):
        self.encoded += prompts
        return torch.stack([drawn_embedding(prompt) for prompt in prompts])


def drawn_embedding(prompt):
    """[512, 1024] bf16."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:6], "big")
    rows = torch.randn(min(512, 1 + len(prompt)), 1024, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(rows, (0, 0, 0, 512 - len(rows))).to(torch.bfloat16)


def write_tiny_t5(folder, seed=0):
    """Writes a T5 as the hub has it, encoder and decoder, with embeddings as wide as T5-11B's; returns the folder."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    specials = ["<pad>", "</s>", "<unk>"]
    vocabulary = [(piece, 0.0) for piece in specials] + [("▁" + word, -2.0) for word in WORDS]
    vocabulary += [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz.,"]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.post_processor = processors.TemplateProcessing(single=["$A", "</s>"], special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    sizes = {"d_model": 1024, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_decoder_layers": 1}
    config = transformers.T5Config(vocab_size=len(vocabulary), **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder
