"""The prompts of a command line as embeddings, the same on all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_mcore.config.derived import TEXT_LENGTH, TEXT_WIDTH
from cosmos_mcore.text.cache import EmbeddingCache
from cosmos_mcore.text.encoder import TextEncoder, fingerprint_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSource:
    """Where embeddings come from.

    Attributes:
        encoder: folder of the text encoder; it need not be there if all prompts have been encoded before.
        cache: folder that keeps embeddings.
    """

    encoder: Path
    cache: Path

    def check(self, prompts: Sequence[str]) -> None:
        """Looks whether embeddings are there or can be made; loads nothing.

        Raises:
            ValueError: if one is missing and there is no encoder, or the cache is another encoder's.
        """
        if not prompts:
            return
        fingerprint = fingerprint_of(self.encoder) if self.encoder.is_dir() else None
        if EmbeddingCache(self.cache, fingerprint).missing(prompts) and fingerprint is None:
            fingerprint_of(self.encoder)  # says what is missing and how to get it

    def embed(self, prompts: Sequence[str], device: torch.device, group: dist.ProcessGroup) -> dict[str, Tensor]:
        """Reads or makes embeddings, on the first rank; the encoder is gone from the device afterwards.

        Args:
            prompts: any number, repeated ones, too; alike on all ranks.
            device: where the encoder runs.
            group: ranks that all call this.

        Returns:
            The embedding [TEXT_LENGTH, TEXT_WIDTH] bf16, on the CPU, of each prompt.

        Raises:
            ValueError: if the encoder's files are damaged, or the cache cannot be written.
        """
        distinct = list(dict.fromkeys(prompts))
        embeddings = torch.empty(len(distinct), TEXT_LENGTH, TEXT_WIDTH, dtype=torch.bfloat16)
        if group.rank() == 0:
            started = time.perf_counter()
            embeddings.copy_(EmbeddingCache(self.cache).embed(distinct, lambda: self._load(device)))
            logger.info("embedded %d prompts in %.1f s", len(distinct), time.perf_counter() - started)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        if group.size() > 1:
            # As bytes: gloo does not know bfloat16 in every version of torch.
            everywhere = embeddings.to(device)
            dist.broadcast(everywhere.view(torch.uint8), dist.get_global_rank(group, 0), group=group)
            embeddings = everywhere.cpu()
        return dict(zip(distinct, embeddings, strict=True))

    def _load(self, device: torch.device) -> TextEncoder:
        logger.info("loading the text encoder from %s", self.encoder)
        return TextEncoder.from_folder(self.encoder, device, torch.bfloat16)
