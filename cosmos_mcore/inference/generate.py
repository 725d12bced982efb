"""Autoregressive generation of token ids."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.tokenizer.cuda_graph import capture


class TokenGenerator:
    """Continues batches of token sequences: one pass over the prompts, then one token each per step.

    On GPUs the step, from embedding to drawn id, is one CUDA graph, captured when the generator is made; memory and
    graph serve all further calls. Every rank of the tensor-parallel group makes one and calls it alike; logits are
    gathered over the group, and the first rank's draw counts.

    Args:
        network: the model.
        batch: sequences at a time.
        options: how each id is drawn.
        text_length: text embeddings per sequence; 0 without text.

    Raises:
        ValueError: for a batch that a GPU's kernels do not take.
    """

    def __init__(self, network: CachedNetwork, batch: int, options: SamplingOptions, text_length: int = 0) -> None:
        most = network.ops.MAX_ROWS
        if most is not None and batch > most:
            raise ValueError(f"{batch} sequences cannot be generated at once on a GPU; give at most {most}")
        self.network, self.batch, self.options = network, batch, options
        self.made_for = batch, options, text_length
        self._cache = network.new_cache(batch, text_length)

        def integers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=network.device)

        # What a step reads and writes lies at fixed addresses: a graph knows nothing else.
        self._ids, self._position, self._seeds = integers(batch, network.capacity), integers(1), integers(batch)
        self._tokens = integers(batch)
        self._graph = _capture(self._step) if network.device.type == "cuda" else None

    @torch.no_grad()
    def __call__(
        self,
        prompt: Tensor,
        num_new_tokens: int,
        seeds: list[int],
        text: Tensor | None = None,
        on_frame: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """Continues ``batch`` sequences.

        Args:
            prompt: [B, P] int64 ids of the leading positions of clips, P at least 1.
            num_new_tokens: how many ids to append, at least 1.
            seeds: one per sequence: its draws depend on nothing else, in whatever batch it stands.
            text: [B, text length, context size] for text-to-video models.
            on_frame: told the video's ids so far [B, n] whenever a latent frame but the last is complete.

        Returns:
            Ids [B, P + num_new_tokens] int64, the prompt in front.

        Raises:
            ValueError: for more tokens than the model has positions, another batch, or weights that are no numbers.
        """
        batch, length = prompt.shape
        if batch != self.batch or len(seeds) != batch:
            raise ValueError(f"the generator was made for {self.batch} sequences, not {batch} with {len(seeds)} seeds")
        if length + num_new_tokens > self.network.capacity:
            raise ValueError(
                f"{length} given and {num_new_tokens} new tokens are more than the model's {self.network.capacity} "
                "positions"
            )
        self._seeds.copy_(torch.tensor(seeds, dtype=torch.int64))
        self._ids[:, :length] = prompt
        self._position.fill_(length - 1)
        logits = self.network.prefill(prompt, self._cache, text)
        if not logits.isfinite().all():  # a GPU would draw an id that there is not
            raise ValueError("the model's logits are not finite numbers: its training has diverged, or it is damaged")
        self._draw(logits)
        first, per_frame = int(self.network.layout.begin_of_video), math.prod(self.network.layout.latent_shape[1:])
        for there in range(length + 1, length + num_new_tokens):
            if on_frame is not None and (there - first) % per_frame == 0:
                on_frame(self._ids[:, first:there])
            self.advance()
        return self._ids[:, : length + num_new_tokens].clone()

    def advance(self) -> None:
        """One more token for each sequence, where there is a position left; asks the device for nothing."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    @torch.no_grad()
    def _step(self) -> None:
        self._draw(self.network.decode(self._tokens, self._position, self._cache))

    def _draw(self, logits: Tensor) -> None:
        """Draws the ids after ``position`` and moves on to them."""
        tokens = self.network.ops.sample(logits, self.options, self._seeds, self._position)
        group = self.network.group
        if group.size() > 1:
            # Ranks may round differently; a single diverging id would garble the rest.
            dist.broadcast(tokens, dist.get_global_rank(group, 0), group=group)
        self._tokens.copy_(tokens)
        self._position.add_(1)
        self._ids.index_copy_(1, self._position, tokens[:, None])


def _capture(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Captures a step in a graph. The cache that the trial runs write is overwritten by the first prompt."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles kernels, opens NCCL's connections
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        step()
    return graph
