"""From a config to everything a run needs: clips, tokenizer, model, optimizer, and the weights it starts from."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer

from cosmos_mcore.checkpoint.load import initialize_weights, load_any_weights
from cosmos_mcore.checkpoint.resume import resume
from cosmos_mcore.config.derived import (
    VideoLayout,
    derive_video_layout,
    num_microbatches,
    prompt_cache_dir,
    run_dir,
    user_path,
)
from cosmos_mcore.config.schema import DataConfig, RunConfig
from cosmos_mcore.data.index import ClipIndex, index_clips
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.sampler import ClipSampler, RoundSampler, WeightedSampler
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.presets import ModelArch, resolve_arch
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.text.cache import EmbeddingCache
from cosmos_mcore.tokenizer.base import VideoTokenizer
from cosmos_mcore.tokenizer.build import build_tokenizer
from cosmos_mcore.training.gradients import mark_overwritten_gradients
from cosmos_mcore.training.optimizer import build_optimizer

logger = logging.getLogger(__name__)


@dataclass
class Progress:
    """How far a run is; part of every checkpoint."""

    iteration: int = 0
    consumed_samples: int = 0


@dataclass
class Run:
    """All parts of a run on this rank."""

    config: RunConfig
    arch: ModelArch
    layout: VideoLayout
    device: torch.device
    loader: ClipLoader
    chunks: list[CosmosARModel]
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    progress: Progress
    tokenizer: VideoTokenizer
    validation: ClipLoader | None

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return run_dir(self.config) / "checkpoints"

    def gather_weights(self) -> None:
        """Brings the weights up to date where Megatron would do so in the next step only. All ranks."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)


def set_up(config: RunConfig) -> Run:
    """Builds everything, the process groups first, and loads the weights.

    Raises:
        ValueError: for what the user can mend: paths, unusable clips, a checkpoint of another model.
    """
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    device = groups.initialize(config.parallel, config.training.seed)
    index = _shared_index(config.data, arch.text_to_video)
    tokenizer = build_tokenizer(config, device)
    chunks, model, optimizer = build_trainable(config, arch, layout, device)
    progress = load_start(config, arch, chunks, optimizer)
    loader = _loader(config, index, _sampler(config, index), tokenizer, arch, layout, device, progress.consumed_samples)
    validation = _validation_loader(config, tokenizer, arch, layout, device)
    return Run(config, arch, layout, device, loader, chunks, model, optimizer, progress, tokenizer, validation)


def _validation_loader(
    config: RunConfig, tokenizer: VideoTokenizer, arch: ModelArch, layout: VideoLayout, device: torch.device
) -> ClipLoader | None:
    """An endless stream of validations, all of the same clips."""
    if config.data.validation_path is None:
        return None
    config = replace(config, data=replace(config.data, path=config.data.validation_path, weights=None))
    index = _shared_index(config.data, arch.text_to_video)
    length = eval_iters(config, len(index.clips)) * config.training.global_batch_size
    sampler = RoundSampler(len(index.clips), config.training.seed, length)
    return _loader(config, index, sampler, tokenizer, arch, layout, device)


def eval_iters(config: RunConfig, num_clips: int) -> int:
    """Batches of a validation: no more than it takes to see all its clips."""
    return min(config.training.eval_iters, -(-num_clips // config.training.global_batch_size))


def _loader(
    config: RunConfig,
    index: ClipIndex,
    sampler: ClipSampler,
    tokenizer: VideoTokenizer,
    arch: ModelArch,
    layout: VideoLayout,
    device: torch.device,
    consumed_samples: int = 0,
) -> ClipLoader:
    return ClipLoader(
        index,
        sampler,
        tokenizer,
        config,
        layout,
        data_parallel_rank=groups.data_parallel_rank(),
        data_parallel_size=groups.data_parallel_world_size(),
        replica_group=groups.replica_group(),
        device=device,
        consumed_samples=consumed_samples,
        embeddings=EmbeddingCache(prompt_cache_dir(config)) if arch.text_to_video else None,
    )


def build_trainable(
    config: RunConfig, arch: ModelArch, layout: VideoLayout, device: torch.device
) -> tuple[list[CosmosARModel], list[DistributedDataParallel], MegatronOptimizer]:
    """This rank's model chunks, the same wrapped for data parallelism, and their optimizer; weights not yet set."""
    chunks = build_model(config, arch, layout, device)
    model = wrap_for_data_parallel(config, chunks)
    optimizer = build_optimizer(config, model)
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    mark_overwritten_gradients(model, num_microbatches(config, dist.get_world_size()))
    return chunks, model, optimizer


def wrap_for_data_parallel(config: RunConfig, chunks: list[CosmosARModel]) -> list[DistributedDataParallel]:
    """Puts Megatron's ``DistributedDataParallel`` round the chunks."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.precision.main_grads == "fp32",
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    megatron_config = chunks[0].config
    model = [
        DistributedDataParallel(megatron_config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    megatron_config.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        megatron_config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
        if parallel.overlap_param_gather:
            start_sync = [chunk.start_param_sync for chunk in model]
            megatron_config.param_sync_func = start_sync if len(model) > 1 else start_sync[0]
    return model


def load_start(
    config: RunConfig, arch: ModelArch, chunks: list[CosmosARModel], optimizer: MegatronOptimizer
) -> Progress:
    """Continues the run's newest checkpoint; else takes the weights of ``checkpoint.load``; else draws new ones.

    Raises:
        ValueError: if what is to be loaded cannot be.
    """
    found = resume(run_dir(config) / "checkpoints", chunks, optimizer)
    if found is not None:
        return Progress(**found)
    if config.checkpoint.load is not None:
        logger.info("loading weights from %s", config.checkpoint.load)
        load_any_weights(user_path(config.checkpoint.load), arch, chunks)
    else:
        logger.info("starting from new weights, seed %d", config.training.seed)
        initialize_weights(chunks, arch, config.training.seed)
    optimizer.reload_model_params()
    return Progress()


def _sampler(config: RunConfig, index: ClipIndex) -> ClipSampler:
    if index.source_sizes is None or config.data.weights is None:
        return ClipSampler(len(index.clips), config.training.seed)
    return WeightedSampler(index.source_sizes, config.data.weights, config.training.seed)


def _shared_index(data: DataConfig, text: bool) -> ClipIndex:
    """Rank 0 reads the folder for all ranks, so that they agree on it."""
    box: list[Any] = [index_clips(data, text) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]
