"""One rank's weights in the form that generation reads them: dense, or 8-bit floating point with a scale per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_mcore.checkpoint.architecture import check_tensors
from cosmos_mcore.checkpoint.load import named_entries
from cosmos_mcore.checkpoint.names import Entry, entries, local_value, original_shapes
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.presets import ModelArch

FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(FP8).max


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer.

    Attributes:
        data: [N, K], in the model's dtype or in FP8.
        scale: [N] float32, what each row of ``data`` is multiplied by; None: nothing.
    """

    data: Tensor
    scale: Tensor | None = None

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] in ``dtype``: the stored tensor itself where it has no scale."""
        if self.scale is None:
            return self.data
        return (self.data.float() * self.scale[:, None]).to(dtype)


def quantize(weight: Tensor) -> Matrix:
    """Rounds a weight [N, K] to FP8 (4 exponent, 3 mantissa bits), each row scaled to the whole range."""
    scale = (weight.abs().amax(dim=1).float() / _FP8_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    return Matrix((weight.float() / scale[:, None]).clamp(-_FP8_MAX, _FP8_MAX).to(FP8), scale)


@dataclass(frozen=True)
class CrossAttentionWeights:
    """Attention to the text of Video2World models; ``norm`` acts on the video, ``q_norm`` and ``k_norm`` on heads."""

    norm: Tensor
    q: Matrix
    kv: Matrix
    q_norm: Tensor
    k_norm: Tensor
    proj: Matrix


@dataclass(frozen=True)
class LayerWeights:
    """One layer; ``qkv`` rows are interleaved by query group, ``fc1`` rows are all gates, then all ups."""

    attention_norm: Tensor
    qkv: Matrix
    q_norm: Tensor
    k_norm: Tensor
    proj: Matrix
    cross: CrossAttentionWeights | None
    mlp_norm: Tensor
    fc1: Matrix
    fc2: Matrix


@dataclass(frozen=True)
class Weights:
    """The network on one tensor-parallel rank.

    Attributes:
        embedding: [embedding size / TP, hidden].
        layers: from the first to the last.
        final_norm: [hidden].
        head: [vocabulary / TP, hidden].
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Matrix


def weights_of(model: CosmosARModel, arch: ModelArch) -> Weights:
    """The weights of a model in training, which share its memory.

    Raises:
        ValueError: for a model in pipeline stages.
    """
    if not (model.pre_process and model.post_process):
        raise ValueError("generation needs the whole model on each rank: use pipeline_model_parallel_size=1")
    parameters = {entry.ours: parameter.detach() for entry, parameter in named_entries([model], arch)}
    return _collect(arch, lambda entry: parameters[entry.ours], Matrix)


def load_weights(path: Path, arch: ModelArch, device: torch.device, dtype: torch.dtype, fp8: bool = False) -> Weights:
    """Reads this rank's weights from a checkpoint of any layout.

    Args:
        path: as ``open_checkpoint`` takes it.
        arch: the model that it must hold.
        device: where the weights go.
        dtype: which they get.
        fp8: round those of the layers to FP8; the embedding, the norms and the head, which decides between tokens, keep
            ``dtype``.

    Raises:
        ValueError: if there is nothing to load, or it is damaged, unsafe, or another model.
    """
    checkpoint = open_checkpoint(path)
    check_tensors(original_shapes(checkpoint.arch), original_shapes(arch), f"{path}, for the configured model,")
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    return weights_from(checkpoint.read, arch, device, dtype, fp8, rank, size, checkpoint.release)


def weights_from(
    get: Callable[[str], Tensor],
    arch: ModelArch,
    device: torch.device,
    dtype: torch.dtype,
    fp8: bool = False,
    rank: int = 0,
    size: int = 1,
    release: Callable[[str], None] = lambda name: None,
) -> Weights:
    """Makes one rank's weights, one parameter at a time.

    Args:
        get: gives full tensors under the original's names.
        arch: the model.
        device: where the weights go.
        dtype: which they get.
        fp8: as in ``load_weights``.
        rank: in the tensor-parallel group.
        size: of that group.
        release: is told of each tensor that is not needed any more.
    """

    def value(entry: Entry) -> Tensor:
        tensor = local_value(get, entry, arch, rank, size).to(device, dtype, copy=True).contiguous()
        for name in entry.originals:
            release(name)
        return tensor

    return _collect(arch, value, quantize if fp8 else Matrix)


def _collect(arch: ModelArch, value: Callable[[Entry], Tensor], matrix: Callable[[Tensor], Matrix]) -> Weights:
    table = {entry.ours: entry for entry in entries(arch)}

    def layer(number: int) -> LayerWeights:
        def get(name: str) -> Tensor:
            return value(table[f"decoder.layers.{number}.{name}.weight"])

        def norm_before(linear: str) -> Tensor:
            return value(table[f"decoder.layers.{number}.{linear}.layer_norm_weight"])

        cross = None
        if arch.text_to_video:
            cross = CrossAttentionWeights(
                norm=get("pre_cross_attn_layernorm"),
                q=matrix(get("cross_attention.linear_q")),
                kv=matrix(get("cross_attention.linear_kv")),
                q_norm=get("cross_attention.q_layernorm"),
                k_norm=get("cross_attention.k_layernorm"),
                proj=matrix(get("cross_attention.linear_proj")),
            )
        return LayerWeights(
            attention_norm=norm_before("self_attention.linear_qkv"),
            qkv=matrix(get("self_attention.linear_qkv")),
            q_norm=get("self_attention.q_layernorm"),
            k_norm=get("self_attention.k_layernorm"),
            proj=matrix(get("self_attention.linear_proj")),
            cross=cross,
            mlp_norm=norm_before("mlp.linear_fc1"),
            fc1=matrix(get("mlp.linear_fc1")),
            fc2=matrix(get("mlp.linear_fc2")),
        )

    return Weights(
        embedding=value(table["embedding.word_embeddings.weight"]),
        layers=tuple(layer(number) for number in range(arch.num_layers)),
        final_norm=value(table["decoder.final_layernorm.weight"]),
        head=Matrix(value(table["output_layer.weight"])),
    )
