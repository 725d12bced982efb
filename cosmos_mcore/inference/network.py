"""The model with a KV cache: one pass over a prompt, then one token per sequence and step.

Megatron's own static cache keeps keys without rotation and turns all of them again for every token, and its position is
a number on the host, which a CUDA graph would freeze. So generation has a forward pass of its own, of the same weights;
the tests hold it to Megatron's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference import torch_ops
from cosmos_mcore.inference.weights import LayerWeights, Matrix, Weights
from cosmos_mcore.model.cross_attention import PositionTable
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.model.rotary import rotary_angles


class Ops(Protocol):
    """What the modules ``torch_ops`` and ``triton_ops`` provide; the former describes arguments and results."""

    @property
    def MAX_ROWS(self) -> int | None:
        """Sequences at a time; None: any number."""

    def linear(self, *args: Any, **kwargs: Any) -> Tensor:
        """``torch_ops.linear``."""

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        """``torch_ops.attend``."""

    def sample(self, *args: Any, **kwargs: Any) -> Tensor:
        """``torch_ops.sample``."""


@dataclass(frozen=True)
class Cache:
    """Keys and values of a batch.

    Attributes:
        keys: [layers, B, groups, capacity, D], turned by their angles.
        values: as ``keys``.
        text_keys: [layers, B, groups, text length, D] of the cross-attention; None without text.
        text_values: as ``text_keys``.
    """

    keys: Tensor
    values: Tensor
    text_keys: Tensor | None = None
    text_values: Tensor | None = None


class CachedNetwork:
    """The network of one tensor-parallel rank, for generation.

    Args:
        weights: of this rank.
        arch: the model.
        layout: of the clips that it was trained on; fixes the positions.
        group: the tensor-parallel group.
    """

    def __init__(self, weights: Weights, arch: ModelArch, layout: VideoLayout, group: dist.ProcessGroup) -> None:
        self.weights, self.arch, self.layout, self.group = weights, arch, layout, group
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.groups = arch.num_query_groups // group.size()
        self.capacity = layout.sequence_length
        angles = rotary_angles(arch, layout.latent_shape, layout.begin_of_video)[:, 0, 0, : arch.kv_channels // 2]
        self.cos, self.sin = angles.cos().to(self.device), angles.sin().to(self.device)
        self.table: Tensor | None = None
        if arch.text_to_video:
            self.table = PositionTable(arch.hidden_size, layout).table[:, 0].to(self.device, self.dtype)
        self.ops: Ops = _decode_ops(self.device)

    def new_cache(self, batch: int, text_length: int = 0) -> Cache:
        """An empty cache for ``batch`` sequences, and for texts of ``text_length`` embeddings each."""
        shape = (len(self.weights.layers), batch, self.groups, self.capacity, self.arch.kv_channels)
        keys, values = (torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2))
        if not text_length:
            return Cache(keys, values)
        shape = (*shape[:3], text_length, shape[4])
        return Cache(keys, values, *(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))

    def prefill(self, prompt: Tensor, cache: Cache, text: Tensor | None = None) -> Tensor:
        """Fills the cache from the prompts, one after the other, so that long prompts need memory for one only.

        Args:
            prompt: [B, P] int64.
            cache: of ``new_cache(B)``.
            text: [B, text length, context size] embeddings of text-to-video models.

        Returns:
            Logits after each prompt's last token, [B, V] float32.
        """
        if (text is None) == self.arch.text_to_video:
            raise ValueError("a text-to-video model needs text embeddings, and only such a model takes them")
        last = [self._prefill_row(row, ids, cache, text) for row, ids in enumerate(prompt)]
        return self._logits(torch.stack(last))

    def decode(self, tokens: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Adds one token to each sequence. Asks the device for nothing, so it can be captured in a CUDA graph.

        Args:
            tokens: [B] int64.
            position: [1] int64, theirs.
            cache: filled up to the position before.

        Returns:
            Logits after these tokens, [B, V] float32.
        """

        def attend(number: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
            return self.ops.attend(
                qkv,
                cache.keys[number],
                cache.values[number],
                position,
                self.cos,
                self.sin,
                layer.q_norm,
                layer.k_norm,
                self.arch.layernorm_epsilon,
            )

        def attend_text(number: int, query: Tensor) -> Tensor:
            assert cache.text_keys is not None and cache.text_values is not None
            out = F.scaled_dot_product_attention(
                query[:, :, None], cache.text_keys[number], cache.text_values[number], enable_gqa=True
            )
            return out.flatten(1)

        rows = None if self.table is None else self.table.index_select(0, position)
        return self._logits(self._layers(self._embed(tokens), rows, self.ops, attend, attend_text))

    def _prefill_row(self, row: int, ids: Tensor, cache: Cache, text: Tensor | None) -> Tensor:
        """Hidden state [hidden] of the last token of one prompt [P]."""
        length = len(ids)

        def attend(number: int, layer: LayerWeights, qkv: Tensor) -> Tensor:
            query, key, value = torch_ops.rotated_heads(
                qkv,
                self.cos[:length],
                self.sin[:length],
                layer.q_norm,
                layer.k_norm,
                self.groups,
                self.arch.layernorm_epsilon,
            )
            key, value = key.transpose(0, 1), value.transpose(0, 1)
            cache.keys[number, row, :, :length], cache.values[number, row, :, :length] = key, value
            out = F.scaled_dot_product_attention(
                query.transpose(0, 1)[None], key[None], value[None], is_causal=True, enable_gqa=True
            )
            return out[0].transpose(0, 1).flatten(1)

        def attend_text(number: int, query: Tensor) -> Tensor:
            assert cache.text_keys is not None and cache.text_values is not None
            of_row = cache.text_keys[number, row : row + 1], cache.text_values[number, row : row + 1]
            out = F.scaled_dot_product_attention(query.transpose(0, 1)[None], *of_row, enable_gqa=True)
            return out[0].transpose(0, 1).flatten(1)

        if text is not None:
            self._store_text(row, text[row].to(self.device, self.dtype), cache)
        rows = None if self.table is None else self.table[:length]
        return self._layers(self._embed(ids), rows, torch_ops, attend, attend_text)[-1]

    def _store_text(self, row: int, text: Tensor, cache: Cache) -> None:
        """Keys and values of one text [text length, context size], the same for all positions of the video."""
        assert cache.text_keys is not None and cache.text_values is not None
        size = self.arch.kv_channels
        for number, layer in enumerate(self.weights.layers):
            assert layer.cross is not None
            both = torch_ops.linear(text, layer.cross.kv).view(len(text), self.groups, 2, size).transpose(0, 1)
            cache.text_keys[number, row] = F.rms_norm(
                both[:, :, 0], (size,), layer.cross.k_norm, self.arch.layernorm_epsilon
            )
            cache.text_values[number, row] = both[:, :, 1]

    def _layers(
        self,
        x: Tensor,
        rows: Tensor | None,
        ops: Ops,
        attend: Callable[[int, LayerWeights, Tensor], Tensor],
        attend_text: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """All layers on hidden states [rows, hidden]; what differs between prompt and step comes as functions."""
        eps, size = self.arch.layernorm_epsilon, self.arch.kv_channels
        for number, layer in enumerate(self.weights.layers):
            if rows is not None:
                x = x + rows
            qkv = ops.linear(x, layer.qkv, norm=layer.attention_norm, eps=eps)
            x = self._add(ops, x, attend(number, layer, qkv), layer.proj)
            if layer.cross is not None:
                query = ops.linear(x, layer.cross.q, norm=layer.cross.norm, eps=eps).unflatten(1, (-1, size))
                query = F.rms_norm(query, (size,), layer.cross.q_norm, eps)
                x = self._add(ops, x, attend_text(number, query), layer.cross.proj)
            x = self._add(ops, x, ops.linear(x, layer.fc1, norm=layer.mlp_norm, eps=eps, gated=True), layer.fc2)
        return x

    def _add(self, ops: Ops, x: Tensor, out: Tensor, weight: Matrix) -> Tensor:
        """``x`` plus the product of ``out`` [rows, this rank's channels] and ``weight``, over all ranks' channels."""
        if self.group.size() == 1:
            return ops.linear(out, weight, residual=x)
        out = ops.linear(out, weight)
        dist.all_reduce(out, group=self.group)
        return x + out

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token ids [n] to [n, hidden]; each rank has a part of the table."""
        table = self.weights.embedding
        if self.group.size() == 1:
            return F.embedding(tokens, table)
        local = tokens - self.group.rank() * len(table)
        owned = (local >= 0) & (local < len(table))
        out = F.embedding(local.clamp(0, len(table) - 1), table) * owned[:, None]
        dist.all_reduce(out, group=self.group)
        return out

    def _logits(self, x: Tensor) -> Tensor:
        """Hidden states [B, hidden] to logits [B, V] float32, gathered over the ranks."""
        eps, norm = self.arch.layernorm_epsilon, self.weights.final_norm
        out = self.ops.linear(x, self.weights.head, norm=norm, eps=eps, dtype=torch.float32)
        ranks = self.group.size()
        if ranks == 1:
            return out
        parts = torch.empty(ranks, *out.shape, dtype=out.dtype, device=out.device)
        dist.all_gather(list(parts.unbind(0)), out, group=self.group)
        return parts.transpose(0, 1).flatten(1)


def _decode_ops(device: torch.device) -> Ops:
    if device.type == "cpu":
        return torch_ops
    from cosmos_mcore.inference import triton_ops  # Triton comes with torch for GPUs only

    return triton_ops
