"""Memory and time of a layout, estimated before anything runs; no torch.

Both are arithmetic with a few measured constants (docs/performance.md): good to a tenth in memory, and for ranking
layouts in time.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

from cosmos_mcore.config.derived import (
    SPATIAL_COMPRESSION,
    data_parallel_size,
    derive_video_layout,
    num_microbatches,
)
from cosmos_mcore.config.schema import ParallelConfig, RunConfig
from cosmos_mcore.config.validate import validate
from cosmos_mcore.config.values import show
from cosmos_mcore.model.presets import ModelArch, check_run_layout, resolve_arch
from cosmos_mcore.parallel.layout import stage_layers

_BYTES = {"bf16": 2, "fp32": 4}
_WORKSPACE = 1.0e9  # cuBLAS, cuDNN, and what is alive for a moment between two kernels
_OUTSIDE_TORCH = 2.5e9  # CUDA's context, NCCL's buffers
# Measured on one H100 with the 4B: useful TFLOP/s of everything but attention, and of attention.
_LINEAR_TFLOPS = {"fp8": 936.0, "bf16": 593.0, "fp32": 40.0}
_ATTENTION_TFLOPS = 432.0
_WEIGHT_CAST_SECONDS = 3.1e-12  # per FP8 weight and step
_OPTIMIZER_BYTES_PER_SECOND = 2.6e12
# Per byte of gradients and micro-batch, where a step has more than one: 15 ms for the 4B and bf16 gradients.
_ACCUMULATE_SECONDS = 1.9e-12
_NVLINK, _NETWORK = 300e9, 40e9  # bytes per second and GPU, seen in collectives
_GPUS_PER_NODE = 8
_MICRO_BATCHES = (1, 2, 4, 8, 16)
# What a layout of one config may say and layouts to choose from do not.
_PLAIN = (
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "recompute_num_layers",
)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by part."""

    weights: float
    gradients: float
    optimizer: float
    fp8_weights: float
    activations: float
    logits: float
    other: float = _WORKSPACE

    @property
    def peak(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` would show."""
        parts = (self.weights, self.gradients, self.optimizer, self.fp8_weights, self.activations, self.logits)
        return sum(parts) + self.other

    @property
    def needed(self) -> float:
        """What the GPU must have."""
        return self.peak * 1.02 + _OUTSIDE_TORCH  # a little is lost to fragmentation

    def __str__(self) -> str:
        names = ("weights", "gradients", "optimizer", "fp8_weights", "activations", "logits", "other")
        parts = ", ".join(f"{name.replace('_', ' ')} {getattr(self, name) / 1e9:.1f}" for name in names)
        return f"{self.peak / 1e9:.1f} GB ({parts})"


def _layer_weights(arch: ModelArch) -> int:
    width = arch.num_attention_heads * arch.kv_channels
    groups = arch.num_query_groups * arch.kv_channels
    attention = arch.hidden_size * (2 * width + 2 * groups)
    cross = arch.hidden_size * 2 * width + (arch.context_size or 0) * 2 * groups if arch.context_size else 0
    return attention + cross + 3 * arch.hidden_size * arch.ffn_hidden_size


def _in_flight(parallel: ParallelConfig, stage: int, microbatches: int) -> float:
    """Micro-batches whose activations a pipeline stage holds at once; earlier stages hold more."""
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    later = stages - 1 - stage
    if virtual is None:
        return min(later + 1, microbatches)
    return min(2 * later + (virtual - 1) * stages + 1, microbatches * virtual) / virtual  # it counts single chunks


def _activation_bytes(config: RunConfig, arch: ModelArch) -> tuple[float, float]:
    """Bytes that one token leaves in a layer for the backward pass: (all of them, those of a recomputed layer)."""
    parallel, number = config.parallel, _BYTES[config.precision.dtype]
    tp = parallel.tensor_model_parallel_size
    split = tp if parallel.sequence_parallel else 1
    stored = 1 if config.precision.fp8 is not None else number  # what matrix products keep of their input
    hidden, ffn = arch.hidden_size, arch.ffn_hidden_size
    width = arch.num_attention_heads * arch.kv_channels
    groups = arch.num_query_groups * arch.kv_channels
    residuals = 2 * hidden * number / split
    normed = 2 * hidden * stored / split
    # Query, key and value as projected, normed and turned; the output for attention and, in FP8, for its projection.
    heads = ((width + 2 * groups) + 2 * (width + groups) + groups + width) * number + (stored < number) * width * stored
    if arch.context_size is not None:  # attention to text: its input, queries as projected and normed, its output
        residuals += hidden * number / split
        normed += hidden * stored / split
        heads += 3 * width * number + (stored < number) * width * stored
    mlp = 2 * ffn * number + ffn * stored
    whole = residuals + normed + (heads + mlp) / tp
    return whole, hidden * number / split


def estimate_memory(config: RunConfig, world_size: int) -> Memory:
    """Memory of the fullest GPU of a run.

    Args:
        config: a run that ``check_run_layout`` has passed.
        world_size: processes.
    """
    arch = resolve_arch(config.model)
    stages = stage_layers(config.parallel, arch.num_layers)
    parts = [_stage_memory(config, world_size, arch, stage, chunks) for stage, chunks in enumerate(stages)]
    return max(parts, key=lambda memory: memory.peak)


def _stage_memory(config: RunConfig, world_size: int, arch: ModelArch, stage: int, chunks: list[int]) -> Memory:
    """Memory of a GPU of one pipeline stage with so many layers in each of its chunks."""
    parallel, precision = config.parallel, config.precision
    layout = derive_video_layout(config, arch.text_to_video)
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    layers, is_first, is_last = sum(chunks), stage == 0, stage == pp - 1
    ends = arch.hidden_size * (arch.embedding_size * is_first + arch.vocab_size * is_last)
    in_layers = layers * _layer_weights(arch) / tp
    weights = in_layers + ends / tp
    shards = world_size // (tp * pp) if parallel.use_distributed_optimizer else 1
    master = 2 if precision.dtype == "bf16" and parallel.use_distributed_optimizer else 4 * (precision.dtype == "bf16")
    state = master + 2 * _BYTES[precision.moments]
    tokens = layout.padded_sequence_length * config.training.micro_batch_size / cp
    whole, recomputed = _activation_bytes(config, arch)
    in_flight = _in_flight(parallel, stage, num_microbatches(config, world_size))
    if parallel.recompute_granularity == "full":
        again = sum(min(parallel.recompute_num_layers or chunk, chunk) for chunk in chunks)
        activations = tokens * (((layers - again) * whole + again * recomputed) * in_flight + whole)
    else:
        activations = tokens * layers * whole * in_flight
    cached = precision.fp8 is not None and parallel.recompute_granularity != "full"
    return Memory(
        weights=weights * _BYTES[precision.dtype],
        gradients=weights * (4 if precision.dtype == "fp32" else _BYTES[precision.main_grads]),
        optimizer=weights * state / shards,
        fp8_weights=in_layers * 2 * cached,
        activations=activations,
        logits=tokens * arch.vocab_size / tp * _BYTES[precision.dtype] * is_last,
    )


def estimate_step_seconds(config: RunConfig, world_size: int) -> float:
    """Time of one optimizer step, for ranking layouts: compute, tensor-parallel traffic, pipeline bubble, update."""
    arch = resolve_arch(config.model)
    parallel, precision = config.parallel, config.precision
    layout = derive_video_layout(config, arch.text_to_video)
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    microbatches = num_microbatches(config, world_size)
    length, clips = layout.padded_sequence_length, config.training.micro_batch_size
    in_layers = arch.num_layers * _layer_weights(arch)
    head = arch.hidden_size * arch.vocab_size
    kind = "fp8" if precision.fp8 is not None else precision.dtype
    passes = 4 / 3 if parallel.recompute_granularity == "full" else 1.0
    linear = 6 * (in_layers * passes + head) * length * clips / (_LINEAR_TFLOPS[kind] * 1e12)
    width = arch.num_attention_heads * arch.kv_channels
    attention = 6 * arch.num_layers * length**2 * width * clips * passes / (_ATTENTION_TFLOPS * 1e12)
    compute = (linear + attention) / (tp * pp * cp)
    bandwidth = _NVLINK if tp * cp <= _GPUS_PER_NODE else _NETWORK
    traffic = 0.0
    if tp > 1:  # four all-gathers and four reduce-scatters a layer, forward and backward
        traffic += 8 * passes * arch.num_layers / pp * length * clips / cp * arch.hidden_size * 2 * (tp - 1) / tp
    if cp > 1:  # keys and values round the ring, and their gradients back
        traffic += (
            3 * arch.num_layers / pp * length * clips * arch.num_query_groups * arch.kv_channels * 4 * (cp - 1) / cp
        )
    one = compute + traffic / bandwidth
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    weights = (in_layers / pp + head + arch.hidden_size * arch.embedding_size) / tp
    forward_backward = one * (microbatches + (pp - 1) / virtual)
    if microbatches > 1:
        forward_backward += _ACCUMULATE_SECONDS * weights * _BYTES[precision.main_grads] * microbatches
    cast = _WEIGHT_CAST_SECONDS * in_layers / (tp * pp) if kind == "fp8" else 0.0
    replicas = world_size // (tp * pp)
    bytes_per_weight = 10 + 4 * _BYTES[precision.moments] + _BYTES[precision.main_grads]
    update = weights * bytes_per_weight / replicas / _OPTIMIZER_BYTES_PER_SECOND
    if replicas > 1:
        reduced = weights * (_BYTES[precision.main_grads] + _BYTES[precision.dtype])
        update += reduced / (_NVLINK if world_size <= _GPUS_PER_NODE else _NETWORK)
    return forward_backward + cast + update


@dataclass(frozen=True)
class Plan:
    """A layout that fits."""

    config: RunConfig
    memory: Memory
    seconds: float
    tokens_per_second: float  # per GPU


def plans(config: RunConfig, gpus: int, gpu_bytes: float) -> list[Plan]:
    """All layouts of ``config`` on ``gpus`` GPUs that fit into ``gpu_bytes`` each, fastest first.

    Global batch and model stay; tensor, pipeline, context parallelism and recomputation vary, each with the micro-batch
    size that is fastest.

    Raises:
        ValueError: if there is no such model, or no layout at all that so many GPUs can share it and the batch in.
    """
    arch = resolve_arch(config.model)
    found: dict[str, Plan] = {}
    refused, possible = [], False
    for candidate in _candidates(config, gpus):
        try:
            check_run_layout(candidate, arch, gpus)
        except ValueError as error:
            refused.append(error)
            continue
        possible = True
        memory = estimate_memory(candidate, gpus)
        if memory.needed > gpu_bytes:
            continue
        seconds = estimate_step_seconds(candidate, gpus)
        tokens = derive_video_layout(candidate, arch.text_to_video).sequence_length * config.training.global_batch_size
        layout = str(candidate.parallel)
        if layout not in found or seconds < found[layout].seconds:
            found[layout] = Plan(candidate, memory, seconds, tokens / seconds / gpus)
    if not possible:
        raise refused[0]  # that of the layout that asks least
    return sorted(found.values(), key=lambda plan: plan.seconds)


def _candidates(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    powers = [2**n for n in range(gpus.bit_length()) if gpus % 2**n == 0]
    sizes = sorted({*_MICRO_BATCHES, config.training.micro_batch_size})
    for tp, pp, cp in itertools.product((n for n in powers if n <= _GPUS_PER_NODE), powers, powers):
        if tp * pp * cp > gpus:
            continue
        for size, recompute in itertools.product(sizes, (False, True)):
            candidate = deepcopy(config)
            candidate.training.micro_batch_size = size
            parallel = candidate.parallel
            parallel.tensor_model_parallel_size, parallel.sequence_parallel = tp, tp > 1
            parallel.pipeline_model_parallel_size, parallel.context_parallel_size = pp, cp
            parallel.recompute_granularity = "full" if recompute else None
            for name in _PLAIN:
                setattr(parallel, name, None)
            yield candidate


def keys_that_save_memory(config: RunConfig, world_size: int) -> list[str]:
    """Overrides that this run does not have yet and what each would save, most first."""
    now = estimate_memory(config, world_size).peak
    changes = (
        ("parallel.recompute_granularity", "full"),
        ("parallel.recompute_num_layers", None),
        ("parallel.sequence_parallel", True),
        ("parallel.use_distributed_optimizer", True),
        ("precision.moments", "bf16"),
        ("precision.main_grads", "bf16"),
        ("training.micro_batch_size", 1),
    )
    savings = []
    for key, value in changes:
        changed = deepcopy(config)
        section, name = key.split(".")
        setattr(getattr(changed, section), name, value)
        try:
            validate(changed)
            check_run_layout(changed, resolve_arch(changed.model), world_size)
        except ValueError:
            continue  # it would need another change first
        text = value if isinstance(value, str) else show(value)
        savings.append((now - estimate_memory(changed, world_size).peak, f"{key}={text}"))
    worthwhile = sorted((saved, text) for saved, text in savings if saved > 5e8)
    lines = [f"{text} (about {saved / 1e9:.0f} GB less)" for saved, text in reversed(worthwhile)]
    return [*lines, "a larger parallel.tensor_model_parallel_size with parallel.sequence_parallel=true, on more GPUs"]


def clip_of_tokens(tokens: int, latents: int) -> tuple[int, int]:
    """(height, width) of a clip of so many latent frames with about so many tokens, 3:5 as the original's.

    Raises:
        ValueError: for less than one token per latent frame.
    """
    if tokens < latents:
        raise ValueError(f"--tokens={tokens} must be at least {latents}: a clip has so many latent frames")
    per_frame = tokens / latents
    rows = max(1, round(math.sqrt(per_frame * 0.6)))
    return rows * SPATIAL_COMPRESSION, max(1, round(per_frame / rows)) * SPATIAL_COMPRESSION


def parse_gpus(text: str) -> tuple[int, float]:
    """``8x80G``: eight GPUs of 80 GiB each, as (count, bytes).

    Raises:
        ValueError: for another form.
    """
    match = re.fullmatch(r"(\d+)x(\d+)G?", text, re.IGNORECASE)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(f"--gpus={text} must be a count and the memory of each GPU, for example 8x80G")
    return int(match[1]), int(match[2]) * 2.0**30


def table(config: RunConfig, found: Sequence[Plan], gpus: int, gpu_bytes: float, top: int) -> str:
    """What ``scripts/plan.py`` prints: the first ``top`` layouts, and how to ask for the first one.

    Raises:
        ValueError: if ``top`` is less than 1.
    """
    layout = derive_video_layout(config, resolve_arch(config.model).text_to_video)
    lines = [
        f"{config.model.preset}, {config.data.num_frames} frames of {config.data.height}x{config.data.width}: "
        f"{layout.sequence_length} tokens; {config.training.global_batch_size} clips a step on {gpus} GPUs of "
        f"{gpu_bytes / 2**30:.0f} GiB"
    ]
    if top < 1:
        raise ValueError(f"--top={top} must be at least 1")
    if not found:
        return lines[0] + "\nno layout fits: the model needs more GPUs, or GPUs with more memory"
    lines.append(
        f"{'TP':>3} {'PP':>3} {'CP':>3} {'DP':>3} {'micro-batch':>12}  {'recompute':10} {'GB':>6} {'ms/step':>8} "
        f"{'tokens/s/GPU':>13}"
    )
    for plan in found[:top]:
        parallel = plan.config.parallel
        lines.append(
            f"{parallel.tensor_model_parallel_size:3} {parallel.pipeline_model_parallel_size:3} "
            f"{parallel.context_parallel_size:3} {data_parallel_size(plan.config, gpus):3} "
            f"{plan.config.training.micro_batch_size:12}  {parallel.recompute_granularity or '-':10} "
            f"{plan.memory.peak / 1e9:6.1f} {plan.seconds * 1e3:8.0f} {plan.tokens_per_second:13.0f}"
        )
    return "\n".join([*lines, f"fastest: {_overrides(config, found[0])}", f"  holds {found[0].memory}"])


def _overrides(config: RunConfig, plan: Plan) -> str:
    """What to write behind the config's name for this layout."""
    parallel, keys = plan.config.parallel, []
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        keys.append(f"parallel.{name}={getattr(parallel, name)}")
    keys.append(f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}")
    keys.append(f"parallel.recompute_granularity={parallel.recompute_granularity or 'null'}")
    keys += [f"parallel.{name}=null" for name in _PLAIN if getattr(config.parallel, name) is not None]
    return " ".join([*keys, f"training.micro_batch_size={plan.config.training.micro_batch_size}"])
