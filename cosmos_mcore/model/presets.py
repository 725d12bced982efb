"""Sizes of the model family (spec/model.md section 1)."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from cosmos_mcore.config.derived import TEXT_WIDTH, num_microbatches
from cosmos_mcore.config.schema import ModelConfig, RunConfig
from cosmos_mcore.parallel.layout import check_layout, check_num_microbatches, check_world_size


@dataclass(frozen=True)
class Yarn:
    """YaRN interpolation of the rotary frequencies (spec/model.md section 3)."""

    scale: float = 2.0
    beta_fast: float = 4.0
    beta_slow: float = 1.0
    original_latent_shape: tuple[int, int, int] = (3, 40, 64)


@dataclass(frozen=True)
class ModelArch:
    """Architecture of one model, in Megatron's terms.

    Attributes:
        vocab_size: rows of the output layer: the video tokens.
        embedding_size: rows of the token embedding (text-to-video models add special tokens, rounded up to 64).
        context_size: width of the text embeddings that cross-attention reads; None: no cross-attention, and then
            neither a begin-of-video token nor the position table that is added before every layer.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int = 14336
    num_attention_heads: int = 32
    num_query_groups: int = 8
    kv_channels: int = 128
    vocab_size: int = 64000
    embedding_size: int = 64000
    layernorm_epsilon: float = 1.0e-5
    rotary_base: float = 500000.0
    yarn: Yarn | None = None
    context_size: int | None = None

    @property
    def text_to_video(self) -> bool:
        """Whether the model reads text: cross-attention, begin-of-video token, position table."""
        return self.context_size is not None


PRESETS = {
    "1b": ModelArch(num_layers=16, hidden_size=2048, kv_channels=64),
    "4b": ModelArch(num_layers=16, hidden_size=4096),
    "12b": ModelArch(num_layers=40, hidden_size=5120, yarn=Yarn()),
    "5b-video2world": ModelArch(num_layers=16, hidden_size=4096, embedding_size=64064, context_size=TEXT_WIDTH),
    "13b-video2world": ModelArch(
        num_layers=40, hidden_size=5120, embedding_size=64064, context_size=TEXT_WIDTH, yarn=Yarn()
    ),
    "tiny": ModelArch(
        num_layers=4, hidden_size=128, ffn_hidden_size=384, num_attention_heads=4, num_query_groups=2, kv_channels=32
    ),
}


def resolve_arch(config: ModelConfig) -> ModelArch:
    """Looks up ``config.preset`` and applies the single fields that the config overrides.

    Raises:
        ValueError: for an unknown preset or sizes that do not fit each other.
    """
    if config.preset not in PRESETS:
        near = difflib.get_close_matches(config.preset, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"model.preset={config.preset} is unknown; did you mean {near}? Known: {', '.join(PRESETS)}")
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    changes = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    for name, value in changes.items():
        if value < 1:
            raise ValueError(f"model.{name}={value} must be at least 1")
    arch = replace(PRESETS[config.preset], **changes)
    if arch.num_attention_heads % arch.num_query_groups:
        raise ValueError(
            f"model.num_attention_heads={arch.num_attention_heads} must be a multiple of "
            f"model.num_query_groups={arch.num_query_groups}"
        )
    if arch.kv_channels % 2:
        raise ValueError(f"model.kv_channels={arch.kv_channels} must be even: the rotary embedding turns pairs")
    return arch


def check_arch_layout(config: RunConfig, arch: ModelArch) -> None:
    """Checks that ``config.parallel`` can cut this model.

    Raises:
        ValueError: naming the key to change and the nearest value that works.
    """
    check_layout(
        config,
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        ffn_hidden_size=arch.ffn_hidden_size,
        vocab_size=arch.vocab_size,
    )


def check_run_layout(config: RunConfig, arch: ModelArch, world_size: int) -> None:
    """Checks that model, layout, processes and batch suit each other.

    Raises:
        ValueError: naming the key to change.
    """
    check_arch_layout(config, arch)
    _check_fp8(config, arch)
    check_world_size(config, world_size)
    check_num_microbatches(config, num_microbatches(config, world_size))


def _check_fp8(config: RunConfig, arch: ModelArch) -> None:
    precision, parallel = config.precision, config.parallel
    if precision.fp8 is None:
        return
    tp, head = parallel.tensor_model_parallel_size, arch.kv_channels
    multiple = 32 if precision.fp8 == "mxfp8" else 16  # what FP8 products demand of both sizes of a matrix
    sizes = {
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size // tp,
        "num_attention_heads x kv_channels": arch.num_attention_heads * head // tp,
        "2 x num_query_groups x kv_channels": 2 * arch.num_query_groups * head // tp,
    }
    for name, size in sizes.items():
        if size % multiple:
            raise ValueError(
                f"precision.fp8={precision.fp8} needs multiples of {multiple}, and model.{name} leaves {size} on each "
                f"of {tp} tensor-parallel ranks; change the size or the layout, or set precision.fp8=null"
            )
    most = arch.num_layers // parallel.pipeline_model_parallel_size
    if max(precision.fp8_first_last_bf16) > most:
        raise ValueError(
            f"precision.fp8_first_last_bf16={precision.fp8_first_last_bf16}: Megatron leaves at most the layers of one "
            f"pipeline stage in bf16 at each end, here {most}; lower it"
        )
