"""The table of parallel layouts that must give one loss curve, and the small model that they train."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from cosmos_mcore.config import RunConfig, data_parallel_size, num_microbatches, validate
from cosmos_mcore.model.presets import ModelArch, check_arch_layout
from cosmos_mcore.parallel.layout import check_num_microbatches, check_world_size

STEPS = 6  # of each layout; then it saves
RESUMED_STEPS = 4  # of each resume from such a checkpoint
CURVE_STEPS = 20

BASE = ModelArch(
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    vocab_size=512,
    embedding_size=512,
)
ARCHS = {"base": BASE, "video2world": replace(BASE, embedding_size=576, context_size=24)}


@dataclass(frozen=True)
class Layout:
    """One row: ``parallel`` replaces fields of ``config.parallel``, ``model`` is a key of ``ARCHS``."""

    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "base"


TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
UNSHARDED = {"use_distributed_optimizer": False}  # the distributed optimizer is the default
OVERLAP = {"overlap_grad_reduce": True}
OVERLAP_BOTH = {**OVERLAP, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}

LAYOUTS = {
    "one": Layout(1),
    "one-unsharded": Layout(1, UNSHARDED),
    "recompute-full": Layout(1, FULL),
    "recompute-full-3-layers": Layout(1, {**FULL, "recompute_num_layers": 3}),
    "recompute-selective": Layout(1, SELECTIVE),
    "v2w-one": Layout(1, model="video2world"),
    "tp2": Layout(2, TP2),
    "tp2-sp": Layout(2, {**TP2, **SP}),
    "tp2-sp-recompute-full": Layout(2, {**TP2, **SP, **FULL}),
    "pp2": Layout(2, PP2),
    "pp2-vpp2": Layout(2, {**PP2, **VPP2}),
    "pp2-uneven": Layout(2, {**PP2, "num_layers_in_first_pipeline_stage": 5}),
    "pp2-recompute-full": Layout(2, {**PP2, **FULL}),
    "cp2": Layout(2, CP2),
    "dp2": Layout(2, UNSHARDED),
    "dp2-distributed-optimizer": Layout(2),
    "dp2-overlap": Layout(2, OVERLAP_BOTH),
    "dp2-overlap-unsharded": Layout(2, {**OVERLAP, **UNSHARDED}),
    "v2w-tp2-sp": Layout(2, {**TP2, **SP}, "video2world"),
    "v2w-pp2": Layout(2, PP2, "video2world"),
    "v2w-pp2-vpp2": Layout(2, {**PP2, **VPP2}, "video2world"),
    "pp2-vpp2-recompute-full-1-layer": Layout(2, {**PP2, **VPP2, **FULL, "recompute_num_layers": 1}),
    "v2w-tp2": Layout(2, TP2, "video2world"),
    "v2w-cp2": Layout(2, CP2, "video2world"),
    "v2w-tp2-cp2-sp": Layout(4, {**TP2, **CP2, **SP}, "video2world"),
    "pp2-vpp2-cp2": Layout(4, {**PP2, **VPP2, **CP2}),
    "tp4-sp": Layout(4, {**TP4, **SP}),
    "pp4": Layout(4, PP4),
    "tp2-pp2-sp": Layout(4, {**TP2, **PP2, **SP}),
    "tp2-pp2-vpp2-sp-overlap": Layout(4, {**TP2, **PP2, **VPP2, **SP, **OVERLAP_BOTH}),
    "tp2-cp2": Layout(4, {**TP2, **CP2}),
    "tp2-cp2-sp": Layout(4, {**TP2, **CP2, **SP}),
    "pp2-cp2": Layout(4, {**PP2, **CP2}),
    "cp2-dp2": Layout(4, CP2),
    "tp2-dp2": Layout(4, TP2),
    "tp2-dp2-unsharded": Layout(4, {**TP2, **UNSHARDED}),
    "pp2-dp2": Layout(4, PP2),
    "pp2-dp2-overlap": Layout(4, {**PP2, **OVERLAP_BOTH}),
    "tp2-pp2-dp2-sp": Layout(8, {**TP2, **PP2, **SP}),
    "tp2-pp2-cp2-sp": Layout(8, {**TP2, **PP2, **CP2, **SP}),
    "pp9": Layout(9, {"pipeline_model_parallel_size": 9}),
}

# Who goes on from whose checkpoint: SAVED>NAME.
RESUMES = [
    "one>recompute-full",
    "one>tp2",
    "tp2>pp2",
    "dp2-distributed-optimizer>tp2-sp",
    "pp2-vpp2>dp2-distributed-optimizer",
    "dp2>dp2",
    "dp2>one-unsharded",
    "cp2>pp2-vpp2",
    "pp2-uneven>cp2",
    "dp2-overlap>dp2-overlap",
    "v2w-tp2-sp>v2w-pp2",
    "one>tp2-pp2-sp",
    "tp2-pp2-sp>tp2-cp2",
    "pp4>tp2-dp2",
    "tp2-dp2>pp2-dp2",
    "pp2-dp2>tp4-sp",
    "tp2-pp2-vpp2-sp-overlap>one",
    "one>tp2-pp2-dp2-sp",
    "tp2-pp2-dp2-sp>pp2",
]

# Those that `make test` runs; `make test-layouts` runs all.
FAST = {
    "one",
    "recompute-full",
    "tp2",
    "tp2-sp",
    "pp2",
    "pp2-vpp2",
    "cp2",
    "dp2",
    "dp2-distributed-optimizer",
    "dp2-overlap",
    "v2w-tp2-sp",
    "one>tp2",
    "tp2>pp2",
    "dp2-distributed-optimizer>tp2-sp",
    "pp2-vpp2>dp2-distributed-optimizer",
}


def parts_of(job: str) -> tuple[str | None, str]:
    """The layout whose checkpoint a job loads, or None, and the layout that it trains with."""
    saved, _, name = job.rpartition(">")
    return saved or None, name


def config_of(name: str) -> RunConfig:
    """The run of a layout: a float32 run of 20 steps over eight clips of 45 tokens, in micro-batches of two.

    45 tokens divide by no group size, so sequence and context parallelism pad.
    """
    layout, config = LAYOUTS[name], RunConfig()
    config.job.project, config.job.group, config.job.name = "tests", "layouts", name
    config.data.height, config.data.width, config.data.num_frames = 48, 80, 17
    config.precision.dtype = "fp32"
    config.optimizer.lr, config.optimizer.clip_grad = 5.0e-3, 0.5  # so that every gradient is clipped
    config.schedule.warmup_iters, config.schedule.decay_iters, config.schedule.min_lr = 3, CURVE_STEPS, 1.0e-4
    config.training.global_batch_size, config.training.micro_batch_size, config.training.seed = 8, 2, 5
    config.logging.tensorboard = False
    for key, value in layout.parallel.items():
        setattr(config.parallel, key, value)
    return config


def check(name: str) -> int:
    """Runs a layout's checks as the command line does and returns its data-parallel size."""
    config, layout = config_of(name), LAYOUTS[name]
    arch = ARCHS[layout.model]
    validate(config)
    check_world_size(config, layout.world_size)
    check_num_microbatches(config, num_microbatches(config, layout.world_size))
    check_arch_layout(config, arch)
    return data_parallel_size(config, layout.world_size)
