"""The one table of parameter names: ours (Megatron's), the original's, its TE backend's and the Hub's, with split axis.

Everything that reads or writes another layout is driven by it. Facts: spec/checkpoint.md sections 1 and 2,
spec/model.md section 11. The Hub's names are those of Hugging Face's Llama and Qwen3 models, which the original's own
exporter uses too as far as it goes; cross-attention follows the same pattern.

Fused parameters are cut and joined on the original's tensors, never on ours: a tensor-parallel shard of ours is the
fusion of the shards of its parts. So one rule covers the query-key-value interleave and gate/up for every TP size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cosmos_mcore.model.presets import ModelArch


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and what it is made of.

    Attributes:
        ours: Megatron's name; ``{i}`` stands for the layer.
        originals: the original's names, without the ``model.`` prefix, in fusion order.
        te: names in the original's TE backend: one for each of ``originals``, or one for all, joined along rows.
        hub: names in safetensors files, one for each of ``originals``.
        split_axis: axis along which tensor parallelism cuts each of ``originals``; None: replicated.
        fusion: how the parts make up ours: ``none``, ``qkv``, ``kv`` (interleaved by query group) or ``gate_up``.
        local: our name in the model built from local modules where it differs (norms that Transformer Engine fuses).
    """

    ours: str
    originals: tuple[str, ...]
    te: tuple[str, ...]
    hub: tuple[str, ...]
    split_axis: int | None = None
    fusion: str = "none"
    local: str | None = None

    def at(self, layer: int) -> Entry:
        """This entry with the layer's number filled in."""

        def fill(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(name.replace("{i}", str(layer)) for name in names)

        return replace(
            self,
            ours=fill((self.ours,))[0],
            originals=fill(self.originals),
            te=fill(self.te),
            hub=fill(self.hub),
            local=None if self.local is None else fill((self.local,))[0],
        )


_OURS = "decoder.layers.{i}."
_ORIGINAL = "layers.{i}."
_HUB = "model.layers.{i}."


def _entry(
    ours: str,
    originals: str,
    te: str,
    hub: str,
    split_axis: int | None = None,
    fusion: str = "none",
    local: str | None = None,
) -> Entry:
    """A layer's entry; names are given without the layer's prefix, several of them separated by blanks."""
    return Entry(
        _OURS + ours,
        tuple(_ORIGINAL + name for name in originals.split()),
        tuple(_ORIGINAL + name for name in te.split()),
        tuple(_HUB + name for name in hub.split()),
        split_axis,
        fusion,
        None if local is None else _OURS + local,
    )


_TE_QKV = "self_attention.layernorm_qkv."
_SELF_ATTENTION_ENTRIES = (
    _entry(
        "self_attention.linear_qkv.weight",
        "attention.wq.weight attention.wk.weight attention.wv.weight",
        f"{_TE_QKV}query_weight {_TE_QKV}key_weight {_TE_QKV}value_weight",
        "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
        split_axis=0,
        fusion="qkv",
    ),
    _entry(
        "self_attention.linear_proj.weight",
        "attention.wo.weight",
        "self_attention.proj.weight",
        "self_attn.o_proj.weight",
        split_axis=1,
    ),
    _entry(
        "self_attention.q_layernorm.weight",
        "attention.q_norm.weight",
        "self_attention.q_norm.weight",
        "self_attn.q_norm.weight",
    ),
    _entry(
        "self_attention.k_layernorm.weight",
        "attention.k_norm.weight",
        "self_attention.k_norm.weight",
        "self_attn.k_norm.weight",
    ),
)
_CROSS_ATTENTION_ENTRIES = (
    _entry(
        "cross_attention.linear_q.weight",
        "cross_attention.wq.weight",
        "inter_attention.layernorm_query.query_weight",
        "cross_attn.q_proj.weight",
        split_axis=0,
    ),
    _entry(
        "cross_attention.linear_kv.weight",
        "cross_attention.wk.weight cross_attention.wv.weight",
        "inter_attention.key_value.key_weight inter_attention.key_value.value_weight",
        "cross_attn.k_proj.weight cross_attn.v_proj.weight",
        split_axis=0,
        fusion="kv",
    ),
    _entry(
        "cross_attention.linear_proj.weight",
        "cross_attention.wo.weight",
        "inter_attention.proj.weight",
        "cross_attn.o_proj.weight",
        split_axis=1,
    ),
    _entry(
        "cross_attention.q_layernorm.weight",
        "cross_attention.q_norm.weight",
        "inter_attention.q_norm.weight",
        "cross_attn.q_norm.weight",
    ),
    _entry(
        "cross_attention.k_layernorm.weight",
        "cross_attention.k_norm.weight",
        "inter_attention.k_norm.weight",
        "cross_attn.k_norm.weight",
    ),
    _entry(
        "pre_cross_attn_layernorm.weight",
        "cross_attention_norm.weight",
        "inter_attention.layernorm_query.layer_norm_weight",
        "cross_attention_layernorm.weight",
    ),
)
_MLP_ENTRIES = (
    _entry(
        "mlp.linear_fc1.weight",
        "feed_forward.w1.weight feed_forward.w3.weight",
        "layernorm_mlp.fc1_weight",
        "mlp.gate_proj.weight mlp.up_proj.weight",
        split_axis=0,
        fusion="gate_up",
    ),
    _entry(
        "mlp.linear_fc2.weight",
        "feed_forward.w2.weight",
        "layernorm_mlp.fc2_weight",
        "mlp.down_proj.weight",
        split_axis=1,
    ),
    _entry(
        "self_attention.linear_qkv.layer_norm_weight",
        "attention_norm.weight",
        _TE_QKV + "layer_norm_weight",
        "input_layernorm.weight",
        local="input_layernorm.weight",
    ),
    _entry(
        "mlp.linear_fc1.layer_norm_weight",
        "ffn_norm.weight",
        "layernorm_mlp.layer_norm_weight",
        "post_attention_layernorm.weight",
        local="pre_mlp_layernorm.weight",
    ),
)
_EMBEDDING = Entry(
    "embedding.word_embeddings.weight",
    ("tok_embeddings.weight",),
    ("tok_embeddings.weight",),
    ("model.embed_tokens.weight",),
    split_axis=0,
)
_HEAD_ENTRIES = (
    Entry("decoder.final_layernorm.weight", ("norm.weight",), ("norm.weight",), ("model.norm.weight",)),
    Entry("output_layer.weight", ("output.weight",), ("output.weight",), ("lm_head.weight",), split_axis=0),
)


def entries(arch: ModelArch) -> Iterator[Entry]:
    """All parameters of a model, layers numbered."""
    yield _EMBEDDING
    cross = _CROSS_ATTENTION_ENTRIES if arch.text_to_video else ()
    for layer in range(arch.num_layers):
        for entry in (*_SELF_ATTENTION_ENTRIES, *cross, *_MLP_ENTRIES):
            yield entry.at(layer)
    yield from _HEAD_ENTRIES


@dataclass(frozen=True)
class Stored:
    """One tensor of a file layout: its name there, and the original's tensors that it holds, joined along rows."""

    name: str
    originals: tuple[str, ...]
    split_axis: int | None


def stored_tensors(arch: ModelArch, naming: str) -> list[Stored]:
    """All tensors of a file layout, in the original's order.

    Args:
        arch: the model.
        naming: ``originals``, ``te`` or ``hub``: the column of the table to take names from.
    """
    stored = []
    for entry in entries(arch):
        names: tuple[str, ...] = getattr(entry, naming)
        groups = [entry.originals] if len(names) < len(entry.originals) else [(part,) for part in entry.originals]
        stored += [Stored(name, group, entry.split_axis) for name, group in zip(names, groups, strict=True)]
    order = {name: i for i, name in enumerate(original_shapes(arch))}
    return sorted(stored, key=lambda tensor: order[tensor.originals[0]])


def part_shape(stored: Stored, shapes: Mapping[str, tuple[int, ...]], tensor_parallel_size: int) -> tuple[int, ...]:
    """Shape of one rank's part of a stored tensor, from full shapes under the original's names."""
    shape = [sum(shapes[name][0] for name in stored.originals), *shapes[stored.originals[0]][1:]]
    if stored.split_axis is not None:
        shape[stored.split_axis] //= tensor_parallel_size
    return tuple(shape)


def stacked_name(ours: str) -> tuple[str, int | None]:
    """Megatron's key of a parameter in a distributed checkpoint, where layers are stacked, and the layer (or None)."""
    parts = ours.split(".")
    if parts[:2] != ["decoder", "layers"]:
        return ours, None
    return ".".join(parts[:2] + parts[3:]), int(parts[2])


def original_shapes(arch: ModelArch) -> dict[str, tuple[int, ...]]:
    """Full shape of every tensor of the original's layout, in the order that numbers its optimizer state."""
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


def ours_shape(entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Full shape of our parameter, from full shapes under the original's names: parts are joined along rows."""
    return (sum(shapes[name][0] for name in entry.originals), *shapes[entry.originals[0]][1:])


def shard(tensor: Tensor, axis: int | None, rank: int, size: int) -> Tensor:
    """Rank ``rank``'s part of ``size`` equal parts along ``axis`` (a view); the whole tensor where ``axis`` is None."""
    if axis is None or size == 1:
        return tensor
    assert tensor.size(axis) % size == 0
    return tensor.chunk(size, dim=axis)[rank]


def shard_rows(rows: Tensor, first: int, total: int, axis: int | None, rank: int, size: int) -> Tensor:
    """As ``shard`` for rows that are ``first`` and following of a tensor of ``total``; there may be none (a view)."""
    if axis != 0:
        return shard(rows, axis, rank, size)
    assert total % size == 0
    part = total // size
    return rows[max(0, rank * part - first) : max(0, (rank + 1) * part - first)]


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
