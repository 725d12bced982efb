"""A golden case of the original as one of our models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cosmos_mcore.checkpoint.load import set_weights
from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.presets import ModelArch, Yarn


def golden_arch(fields: dict[str, Any], embedding_size: int) -> ModelArch:
    """The architecture from the original's field names."""
    yarn = None
    if fields["apply_yarn"]:
        yarn = Yarn(
            scale=fields["yarn_scale"],
            beta_fast=fields["yarn_beta_fast"],
            beta_slow=fields["yarn_beta_slow"],
            original_latent_shape=tuple(fields["original_latent_shape"]),
        )
    return ModelArch(
        num_layers=fields["n_layers"],
        hidden_size=fields["dim"],
        ffn_hidden_size=fields["ffn_hidden_size"],
        num_attention_heads=fields["n_heads"],
        num_query_groups=fields["n_kv_heads"],
        kv_channels=fields["head_dim"] or fields["dim"] // fields["n_heads"],
        vocab_size=fields["vocab_size"],
        embedding_size=embedding_size,
        yarn=yarn,
        context_size=fields["context_dim"] if fields["insert_cross_attn"] else None,
    )


def golden_model(path: Path, config: RunConfig) -> tuple[dict[str, Any], ModelArch, VideoLayout, list[CosmosARModel]]:
    """Loads a golden file and builds this rank's chunks with its weights, in float32 on the CPU."""
    case = torch.load(path, weights_only=True)
    arch = golden_arch(case["config"], len(case["state_dict"]["model.tok_embeddings.weight"]))
    layout = VideoLayout(
        pixel_chunk_duration=1,
        latent_shape=tuple(case["config"]["video_latent_shape"]),
        begin_of_video=False,  # also in the video2world case
        padded_sequence_length=case["tokens"].size(1),
        num_ignored_tokens=case["ignore_first_num_tokens"],
    )
    chunks = build_model(config, arch, layout, torch.device("cpu"))
    set_weights(chunks, arch, lambda name: case["state_dict"]["model." + name])
    return case, arch, layout, chunks
