"""Checks before anything costly starts: no torch, no process groups."""

from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

from cosmos_mcore.checkpoint.pointer import candidates
from cosmos_mcore.config.derived import (
    data_parallel_size,
    derive_video_layout,
    num_microbatches,
    prompt_cache_dir,
    run_dir,
    user_path,
)
from cosmos_mcore.config.schema import DataConfig, RunConfig
from cosmos_mcore.data.index import find_files, prompts_of
from cosmos_mcore.data.token_cache import check_settings, clip_settings, is_cache
from cosmos_mcore.model.presets import check_run_layout, resolve_arch
from cosmos_mcore.parallel.layout import model_parallel_size
from cosmos_mcore.text.cache import EmbeddingCache
from cosmos_mcore.training.plan import estimate_memory


def preflight(config: RunConfig, world_size: int) -> None:
    """Checks model, layout, batch, clips, checkpoint and output folder.

    Args:
        config: the run's.
        world_size: processes that run already; 1 stands for as many as the layout needs.

    Raises:
        ValueError: one sentence for the first thing that cannot work.
    """
    arch = resolve_arch(config.model)
    derive_video_layout(config, arch.text_to_video)
    count = processes(config, world_size)
    check_run_layout(config, arch, count)
    absent = [rank for rank in config.logging.profile_ranks if rank >= count]
    if config.logging.profile_step_start is not None and absent:
        raise ValueError(
            f"logging.profile_ranks={config.logging.profile_ranks}: there is no rank {absent[0]} in a run of {count} "
            f"processes; the last one is {count - 1}"
        )
    if config.data.prompts is not None and not arch.text_to_video:
        raise ValueError(
            f"data.prompts={config.data.prompts}, but model.preset={config.model.preset} reads no text; set "
            "data.prompts to null, or choose 5b-video2world or 13b-video2world"
        )
    for folder in (config.data.path, config.data.token_cache):
        if is_cache(folder):
            check_settings(user_path(str(folder)), clip_settings(config.data))
    if not is_cache(config.data.path):
        find_files(config.data)
    _check_tokenizer(config)
    validation = replace(config.data, path=config.data.validation_path or config.data.path)
    if config.data.validation_path is not None:
        find_files(validation)
    if arch.text_to_video:
        _check_prompts(config, validation)
    if not candidates(run_dir(config) / "checkpoints"):
        _check_start(config.checkpoint.load)
    _check_writable(run_dir(config))


def _check_tokenizer(config: RunConfig) -> None:
    if config.tokenizer.name == "haar" or config.tokenizer.path is None:
        return
    for name in ("encoder.jit", "decoder.jit"):
        if not (user_path(config.tokenizer.path) / name).is_file():
            raise ValueError(
                f"tokenizer.path={config.tokenizer.path} has no {name}; download it with "
                "scripts/download_autoregressive_checkpoints.py, or try tokenizer.name=haar"
            )


def _check_prompts(config: RunConfig, validation: DataConfig) -> None:
    """Sees that there are prompts, and embeddings of all of them."""
    cache = EmbeddingCache(prompt_cache_dir(config))
    prompts = [*prompts_of(config.data).by_path.values(), *prompts_of(validation).by_path.values()]
    missing = cache.missing(prompts)
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(set(prompts))} prompts have no embedding in {cache.folder} yet, for example "
            f"'{missing[0][:60]}'; make them with scripts/embed_prompts.py and this config"
        )


def _check_start(load: str | None) -> None:
    if load is None:
        return
    path = user_path(load)
    if not path.exists() and not list(path.parent.glob(f"{path.stem}_*mp_0.pt")):
        raise ValueError(f"checkpoint.load={load} does not exist; give a checkpoint, or null to start from new weights")
    if path.suffix == ".pt" and path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"checkpoint.load={load} is not a complete torch file; copy or download it again")


def processes(config: RunConfig, world_size: int) -> int:
    """Processes of the run: those that run, or one replica's where a single process will start them."""
    return max(world_size, model_parallel_size(config)) if world_size == 1 else world_size


def derived_numbers(config: RunConfig, world_size: int) -> str:
    """The numbers that follow from the config, one per line."""
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    count = processes(config, world_size)
    parallel = config.parallel
    rows = {
        "run folder": run_dir(config),
        "model": f"{config.model.preset}: {arch.num_layers} layers, width {arch.hidden_size}",
        "clip": f"{config.data.num_frames} frames of {config.data.height}x{config.data.width}",
        **({"prompts": _shown_prompts(config)} if arch.text_to_video else {}),
        "latent shape (T, H, W)": layout.latent_shape,
        "sequence length": f"{layout.sequence_length} (padded to {layout.padded_sequence_length})",
        "ignored first tokens": layout.num_ignored_tokens,
        "loss positions / z-loss positions": f"{layout.num_loss_positions} / {layout.num_z_loss_positions}",
        "processes": f"{count} = TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} "
        f"x CP {parallel.context_parallel_size} x DP {data_parallel_size(config, count)}",
        "micro-batches per step": f"{num_microbatches(config, count)} of {config.training.micro_batch_size} clips",
        "tokens per step": config.training.global_batch_size * layout.sequence_length,
        "memory of a GPU, estimated": estimate_memory(config, count),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _shown_prompts(config: RunConfig) -> str:
    return f"{config.data.prompts or 'a .txt beside each video'}, embeddings in {prompt_cache_dir(config)}"


def _check_writable(folder: Path) -> None:
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"the run's folder {folder} cannot be made: {existing} is not a writable folder; set OUTPUT_ROOT"
        )
