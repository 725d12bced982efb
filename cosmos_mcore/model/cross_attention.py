"""What Video2World models have more than the base models: attention to text and a position table before every layer.

Both are modules of the layer spec (spec/model.md sections 2 and 4). Megatron's own cross-attention refuses grouped
queries and takes a context as wide as the model only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.model.sequence import zigzag_slice


@dataclass
class GroupedCrossAttentionSubmodules:
    """Classes of the parts: column- and row-parallel linear layers, norm over head channels, attention itself."""

    linear_q: type
    linear_kv: type
    core_attention: type
    linear_proj: type
    q_layernorm: type
    k_layernorm: type


class GroupedCrossAttention(MegatronModule):
    """Attention from the video to text embeddings, with grouped queries and QK-norm, without rotation or mask.

    Args:
        config: of the model.
        submodules: classes of the parts.
        layer_number: from 1.
        context_size: width of the text embeddings.
        pg_collection: the process groups.
        **_: what else ``TransformerLayer`` passes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GroupedCrossAttentionSubmodules,
        layer_number: int,
        context_size: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        assert config.kv_channels is not None and config.num_query_groups is not None
        self.head_dim = config.kv_channels
        # Every rank holds the whole text, so neither sequence nor context parallelism cuts keys and values.
        whole = copy.copy(config)
        whole.sequence_parallel, whole.context_parallel_size = False, 1
        linear = {"bias": False, "skip_bias_add": False, "is_expert": False, "tp_group": pg_collection.tp}
        self.linear_q = submodules.linear_q(
            config.hidden_size,
            config.num_attention_heads * self.head_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.linear_kv = submodules.linear_kv(
            context_size,
            2 * config.num_query_groups * self.head_dim,
            config=whole,
            init_method=config.init_method,
            gather_output=False,
            **linear,
        )
        self.core_attention = submodules.core_attention(
            config=whole,
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.no_mask,
            attention_type="cross",
            pg_collection=pg_collection,
        )
        self.linear_proj = submodules.linear_proj(
            config.num_attention_heads * self.head_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            **{**linear, "skip_bias_add": True},
        )
        self.q_layernorm = submodules.q_layernorm(
            config=config, hidden_size=self.head_dim, eps=config.layernorm_epsilon
        )
        self.k_layernorm = submodules.k_layernorm(
            config=config, hidden_size=self.head_dim, eps=config.layernorm_epsilon
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends to the text.

        Args:
            hidden_states: [S, B, hidden], this rank's slice under sequence parallelism.
            attention_mask: must be None: all positions of the text are attended to, padding too, as in the original.
            key_value_states: [text length, B, context size], whole on every rank.
            inference_context: what ``TransformerLayer`` passes; always None here.

        Returns:
            [S, B, hidden] and no bias.
        """
        assert attention_mask is None
        if key_value_states is None:
            raise ValueError("a text-to-video model needs text embeddings as context, and none were given")
        query = self._heads(self.linear_q(hidden_states)[0], 1)[0]
        key, value = self._heads(self.linear_kv(key_value_states)[0], 2)
        out = self.core_attention(
            self.q_layernorm(query), self.k_layernorm(key), value, None, attn_mask_type=AttnMaskType.no_mask
        )
        return self.linear_proj(out)

    def _heads(self, mixed: Tensor, parts: int) -> list[Tensor]:
        """[S, B, n * parts * D] to ``parts`` tensors [S, B, n, D]."""
        return [
            t.contiguous() for t in mixed.view(*mixed.shape[:2], -1, parts * self.head_dim).split(self.head_dim, -1)
        ]


class PositionTable(torch.nn.Module):
    """Sinusoidal table over (time, height, width), rounded to bf16 as in the original even in float32 models.

    One instance is shared by all layers. Rows are zero for the begin-of-video token in front and for padding behind.
    """

    table: Tensor

    def __init__(self, width: int, layout: VideoLayout) -> None:
        super().__init__()
        spatial = 2 * (width // 6)
        t, h, w = (
            _sinusoids(length, channels)
            for length, channels in zip(layout.latent_shape, (width - 2 * spatial, spatial, spatial), strict=True)
        )
        parts = (t[:, None, None], h[None, :, None], w[None, None, :])
        grid = torch.cat([part.expand(*layout.latent_shape, -1) for part in parts], dim=-1).reshape(-1, width)
        table = torch.zeros(layout.padded_sequence_length, 1, width, dtype=torch.bfloat16)
        first = int(layout.begin_of_video)
        table[first : first + len(grid), 0] = grid
        self.register_buffer("table", table, persistent=False)


def _sinusoids(length: int, channels: int) -> Tensor:
    """[length, channels] bf16: sin half, then cos half, of position x 10000^(-2k/channels), computed in float64."""
    k = torch.arange(channels // 2, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * 10000.0 ** (-k / (channels / 2))
    return torch.cat((angles.sin(), angles.cos()), dim=-1).to(torch.bfloat16)


class PositionedTransformerLayer(TransformerLayer):
    """Megatron's layer with the position table added to its input."""

    def __init__(self, *args: Any, position_table: PositionTable, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position_table = position_table

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's layer; ``hidden_states`` [S, B, hidden] are this rank's part of the sequence."""
        rows = self._rows(len(hidden_states))
        return super().forward(hidden_states + rows.to(hidden_states.dtype), *args, **kwargs)

    def _rows(self, length: int) -> Tensor:
        table = self.position_table.table
        context = self.pg_collection.cp
        if context.size() > 1:
            table = zigzag_slice(table, context.rank(), context.size())
        if self.config.sequence_parallel:
            return table.chunk(self.pg_collection.tp.size())[self.pg_collection.tp.rank()]
        return table[:length]
