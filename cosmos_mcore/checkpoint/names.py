"""The one table of parameter names: ours (Megatron's), the original's, and the TE-backend's, with split axis and fusion.

Everything that reads or writes another layout is driven by it. Facts: spec/checkpoint.md sections 1 and 2,
spec/model.md section 11.

Fused parameters are cut and joined on the original's tensors, never on ours: a tensor-parallel shard of ours is the
fusion of the shards of its parts. So one rule covers the query-key-value interleave and gate/up for every TP size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos_mcore.model.presets import ModelArch


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and what it is made of.

    Attributes:
        ours: Megatron's name; ``{i}`` stands for the layer.
        local: the name in the model built from local modules where it differs (norms that Transformer Engine fuses).
        originals: the original's names, without the ``model.`` prefix, in fusion order.
        split_axis: axis along which tensor parallelism cuts each of ``originals``; None: replicated.
        fusion: how the parts make up ours: ``none``, ``qkv``, ``kv`` (interleaved by query group) or ``gate_up``.
    """

    ours: str
    originals: tuple[str, ...]
    split_axis: int | None = None
    fusion: str = "none"
    local: str | None = None

    def at(self, layer: int) -> Entry:
        """This entry with the layer's number filled in."""
        fill = lambda name: name.replace("{i}", str(layer))  # noqa: E731
        return Entry(
            fill(self.ours),
            tuple(fill(name) for name in self.originals),
            self.split_axis,
            self.fusion,
            None if self.local is None else fill(self.local),
        )


_LAYER = "decoder.layers.{i}."
_ATTENTION = "layers.{i}.attention."
_CROSS = "layers.{i}.cross_attention."
_MLP = "layers.{i}.feed_forward."

_SELF_ATTENTION_ENTRIES = (
    Entry(
        _LAYER + "self_attention.linear_qkv.weight",
        (_ATTENTION + "wq.weight", _ATTENTION + "wk.weight", _ATTENTION + "wv.weight"),
        split_axis=0,
        fusion="qkv",
    ),
    Entry(_LAYER + "self_attention.linear_proj.weight", (_ATTENTION + "wo.weight",), split_axis=1),
    Entry(_LAYER + "self_attention.q_layernorm.weight", (_ATTENTION + "q_norm.weight",)),
    Entry(_LAYER + "self_attention.k_layernorm.weight", (_ATTENTION + "k_norm.weight",)),
)
_CROSS_ATTENTION_ENTRIES = (
    Entry(_LAYER + "cross_attention.linear_q.weight", (_CROSS + "wq.weight",), split_axis=0),
    Entry(
        _LAYER + "cross_attention.linear_kv.weight",
        (_CROSS + "wk.weight", _CROSS + "wv.weight"),
        split_axis=0,
        fusion="kv",
    ),
    Entry(_LAYER + "cross_attention.linear_proj.weight", (_CROSS + "wo.weight",), split_axis=1),
    Entry(_LAYER + "cross_attention.q_layernorm.weight", (_CROSS + "q_norm.weight",)),
    Entry(_LAYER + "cross_attention.k_layernorm.weight", (_CROSS + "k_norm.weight",)),
    Entry(_LAYER + "pre_cross_attn_layernorm.weight", ("layers.{i}.cross_attention_norm.weight",)),
)
_MLP_ENTRIES = (
    Entry(
        _LAYER + "mlp.linear_fc1.weight",
        (_MLP + "w1.weight", _MLP + "w3.weight"),
        split_axis=0,
        fusion="gate_up",
    ),
    Entry(_LAYER + "mlp.linear_fc2.weight", (_MLP + "w2.weight",), split_axis=1),
    Entry(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        ("layers.{i}.attention_norm.weight",),
        local=_LAYER + "input_layernorm.weight",
    ),
    Entry(
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        ("layers.{i}.ffn_norm.weight",),
        local=_LAYER + "pre_mlp_layernorm.weight",
    ),
)
_EMBEDDING = Entry("embedding.word_embeddings.weight", ("tok_embeddings.weight",), split_axis=0)
_HEAD_ENTRIES = (
    Entry("decoder.final_layernorm.weight", ("norm.weight",)),
    Entry("output_layer.weight", ("output.weight",), split_axis=0),
)


def entries(arch: ModelArch) -> Iterator[Entry]:
    """All parameters of a model, layers numbered."""
    yield _EMBEDDING
    cross = _CROSS_ATTENTION_ENTRIES if arch.text_to_video else ()
    for layer in range(arch.num_layers):
        for entry in (*_SELF_ATTENTION_ENTRIES, *cross, *_MLP_ENTRIES):
            yield entry.at(layer)
    yield from _HEAD_ENTRIES


def original_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Full shape of every tensor of the original's layout, in the original's order (which numbers its optimizer state)."""
    hidden, head = arch.hidden_size, arch.kv_channels
    q, kv, ffn = arch.num_attention_heads * head, arch.num_query_groups * head, arch.ffn_hidden_size
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (arch.embedding_size, hidden)}
    for i in range(arch.num_layers):
        attentions = [("attention", hidden)]
        if arch.context_size is not None:
            attentions.append(("cross_attention", arch.context_size))
        for attention, source in attentions:
            prefix = f"layers.{i}.{attention}."
            shapes[prefix + "wq.weight"] = (q, hidden)
            shapes[prefix + "wk.weight"] = (kv, source)
            shapes[prefix + "wv.weight"] = (kv, source)
            shapes[prefix + "wo.weight"] = (hidden, q)
            shapes[prefix + "q_norm.weight"] = (head,)
            shapes[prefix + "k_norm.weight"] = (head,)
        if arch.context_size is not None:
            shapes[f"layers.{i}.cross_attention_norm.weight"] = (hidden,)
        shapes[f"layers.{i}.feed_forward.w1.weight"] = (ffn, hidden)
        shapes[f"layers.{i}.feed_forward.w2.weight"] = (hidden, ffn)
        shapes[f"layers.{i}.feed_forward.w3.weight"] = (ffn, hidden)
        shapes[f"layers.{i}.attention_norm.weight"] = (hidden,)
        shapes[f"layers.{i}.ffn_norm.weight"] = (hidden,)
    shapes["norm.weight"] = (hidden,)
    shapes["output.weight"] = (arch.vocab_size, hidden)
    return shapes


def shard(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    """Rank ``rank``'s part of ``size`` equal parts along ``axis`` (a view); the whole tensor where ``axis`` is None."""
    if axis is None or size == 1:
        return tensor
    assert tensor.size(axis) % size == 0
    return tensor.chunk(size, dim=axis)[rank]


def fuse(parts: Sequence[Tensor], entry: Entry, arch: ModelArch) -> Tensor:
    """Joins the original's tensors (full, or all cut for the same rank) to our parameter.

    Query-key-value rows are interleaved by query group: the group's query heads, its key, its value.
    """
    if entry.fusion == "none":
        return parts[0]
    if entry.fusion == "gate_up":
        return torch.cat(list(parts), dim=0)
    groups = parts[-1].size(0) // arch.kv_channels
    return torch.cat([part.reshape(groups, -1, part.size(-1)) for part in parts], dim=1).flatten(0, 1)


def unfuse(tensor: Tensor, entry: Entry, arch: ModelArch) -> list[Tensor]:
    """Takes our parameter (full, or one rank's part) apart into the original's tensors: the inverse of ``fuse``."""
    if entry.fusion == "none":
        return [tensor]
    if entry.fusion == "gate_up":
        return list(tensor.chunk(2, dim=0))
    head = arch.kv_channels
    rows = [head, head]
    if entry.fusion == "qkv":
        rows.insert(0, head * arch.num_attention_heads // arch.num_query_groups)
    grouped = tensor.reshape(-1, sum(rows), tensor.size(-1))
    return [part.reshape(-1, tensor.size(-1)) for part in grouped.split(rows, dim=1)]


def local_value(get: Callable[[str], Tensor], entry: Entry, arch: ModelArch, tp_rank: int, tp_size: int) -> Tensor:
    """One rank's value of a parameter of ours, from full tensors under the original's names."""
    return fuse([shard(get(name), entry.split_axis, tp_rank, tp_size) for name in entry.originals], entry, arch)
