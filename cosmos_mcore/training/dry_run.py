"""``--dry-run``: builds every part of a run without its memory or its processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cosmos_mcore.checkpoint.pointer import candidates
from cosmos_mcore.config.derived import derive_video_layout, run_dir
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel import cpu_mode
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.parallel.launch import world_size
from cosmos_mcore.tokenizer.build import build_tokenizer
from cosmos_mcore.training.flops import flops_per_clip, num_parameters
from cosmos_mcore.training.preflight import derived_numbers, processes


def dry_run(config: RunConfig) -> str:
    """Builds rank 0 of the run in this process, weights on the meta device, and reads the clips.

    Returns:
        The derived numbers, one per line.

    Raises:
        ValueError: as the run itself would.
    """
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    index = index_clips(config.data, arch.text_to_video)
    build_tokenizer(config, cpu_mode.CPU)
    # torch's fake backend: the groups of the whole layout in one process, without communication.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes(config, world_size()))
    groups.initialize(config.parallel, config.training.seed)
    with torch.device("meta"):
        chunks = build_model(config, arch, layout, torch.device("meta"))
    of_rank = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
    found = candidates(run_dir(config) / "checkpoints")
    start = f"resume from {found[0]}" if found else config.checkpoint.load or "new weights"
    groups.shut_down()
    lines = {
        "parameters": f"{num_parameters(arch):,} ({of_rank:,} on rank 0)",
        "TFLOP per clip": f"{flops_per_clip(arch, layout.sequence_length) / 1e12:.3f}",
        "clips": f"{len(index.clips):,} ({len(index.skipped)} files skipped)",
        "starts from": start,
    }
    return "\n".join([derived_numbers(config, world_size()), *(f"{name:33}  {value}" for name, value in lines.items())])
