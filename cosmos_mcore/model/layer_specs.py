"""Layer specs of the model from Megatron-Core's parts: Transformer Engine on GPUs, local modules on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import MegatronModule, ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from cosmos_mcore.model.cross_attention import (
    GroupedCrossAttention,
    GroupedCrossAttentionSubmodules,
    PositionedTransformerLayer,
    PositionTable,
)
from cosmos_mcore.model.sequence import zigzag_positions


class RMSNorm(torch.nn.RMSNorm):
    """Torch's RMSNorm with Megatron's signature.

    Marks its weight under sequence parallelism, so that ``finalize_model_grads`` sums its gradient over the TP group;
    Megatron's own wrapper of torch norms refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1.0e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class TorchAttention(MegatronModule):
    """Core attention through torch's ``scaled_dot_product_attention``: any device, GQA without copies of K and V.

    Under context parallelism K and V of all ranks are gathered; each rank holds two slices of the sequence in
    Megatron's zig-zag order (``zigzag_positions``).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp if pg_collection is not None and self.causal else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attends.

        Args:
            query: [Sq, B, heads, D].
            key: [Sk, B, groups, D].
            value: as ``key``.
            attention_mask: bool, broadcastable to [B, heads, Sq, Sk], True where attention is forbidden; or None.
            attn_mask_type: ignored: fixed when the layer is built.
            attention_bias: not supported.
            packed_seq_params: not supported.

        Returns:
            [Sq, B, heads * D].
        """
        assert attention_bias is None and packed_seq_params is None
        causal, mask = self.causal, None
        if self.cp_group is not None and self.cp_group.size() > 1:
            key, value = (
                tensor_parallel.gather_from_sequence_parallel_region(
                    t.contiguous(), tensor_parallel_output_grad=True, group=self.cp_group
                )
                for t in (key, value)
            )
            ranks, length = self.cp_group.size(), len(key)
            of_keys = torch.cat([zigzag_positions(length, rank, ranks) for rank in range(ranks)])
            of_queries = zigzag_positions(length, self.cp_group.rank(), ranks)
            causal, mask = False, (of_keys[None, :] <= of_queries[:, None]).to(query.device)
        elif attention_mask is not None and not causal:
            mask = ~attention_mask
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.softmax_scale, enable_gqa=q.size(1) != k.size(1)
        )
        return out.permute(2, 0, 1, 3).reshape(len(query), query.size(1), -1)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict:
        """Nothing to save."""
        return {}


@dataclass(frozen=True)
class Text:
    """What the layers of a text-to-video model need besides Megatron's config."""

    context_size: int
    position_table: PositionTable


def block_spec(
    config: TransformerConfig, transformer_engine: bool, vp_stage: int | None, text: Text | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm.

    Args:
        config: of the model.
        transformer_engine: take Transformer Engine's modules (GPUs), else local ones.
        vp_stage: virtual pipeline stage.
        text: for text-to-video models.
    """
    parts = _transformer_engine_parts() if transformer_engine else _LOCAL
    layer = _layer_spec(parts, text)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=parts.norm)


@dataclass(frozen=True)
class _Parts:
    layer: Callable[[], ModuleSpec]
    norm: type
    core_attention: type
    column_linear: type
    row_linear: type


def _local_layer() -> ModuleSpec:
    spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = TorchAttention
    return spec


_LOCAL = _Parts(
    _local_layer, RMSNorm, TorchAttention, tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear
)


def _transformer_engine_parts() -> _Parts:
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    return _Parts(
        lambda: get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True),
        TENorm,
        TEDotProductAttention,
        TEColumnParallelLinear,
        TERowParallelLinear,
    )


def _layer_spec(parts: _Parts, text: Text | None) -> ModuleSpec:
    spec = parts.layer()
    if text is None:
        return spec
    spec.module = PositionedTransformerLayer
    spec.params = {**spec.params, "position_table": text.position_table}
    layer = spec.submodules
    layer.pre_cross_attn_layernorm = parts.norm
    layer.cross_attention = ModuleSpec(
        module=GroupedCrossAttention,
        params={"context_size": text.context_size},
        submodules=GroupedCrossAttentionSubmodules(
            linear_q=parts.column_linear,
            linear_kv=parts.column_linear,
            core_attention=parts.core_attention,
            linear_proj=parts.row_linear,
            q_layernorm=parts.norm,
            k_layernorm=parts.norm,
        ),
    )
    layer.cross_attn_bda = get_bias_dropout_add
    return spec
