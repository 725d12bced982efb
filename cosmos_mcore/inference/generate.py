"""Autoregressive generation of token ids with Megatron's KV cache."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from cosmos_mcore.inference.sampling import SamplingOptions, sample_tokens
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel


@torch.no_grad()
def generate_tokens(
    model: CosmosARModel,
    prompt: Tensor,
    num_new_tokens: int,
    options: SamplingOptions,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues token sequences: one pass over the prompt, then one token at a time (spec/inference.md section 4).

    Every rank of the tensor-parallel group calls this with the same arguments and gets the same result: the logits are
    gathered over the group and the first rank's draw counts.

    Args:
        model: the whole model on every tensor-parallel rank, in eval mode.
        prompt: [B, P] int64 ids of the leading positions of a clip, P at least 1.
        num_new_tokens: how many ids to append.
        options: how each id is drawn.
        generator: source of randomness on the prompt's device; None: torch's default one.

    Returns:
        Ids [B, P + num_new_tokens] int64, the prompt in front.

    Raises:
        ValueError: for a model in pipeline stages, or more tokens than the model has positions.
    """
    if not (model.pre_process and model.post_process):
        raise ValueError("generation needs the whole model on each rank: use pipeline_model_parallel_size=1")
    batch, prompt_length = prompt.shape
    total = prompt_length + num_new_tokens
    if total > len(model.rotary_angles):
        raise ValueError(
            f"{prompt_length} given and {num_new_tokens} new tokens are more than the model's "
            f"{len(model.rotary_angles)} positions"
        )
    ids = torch.cat((prompt, prompt.new_empty(batch, num_new_tokens)), dim=1)
    cache = StaticInferenceContext(batch, total)
    fed = 0
    for position in range(prompt_length, total):
        if fed:
            cache.enable_decode_mode()
        logits = model(ids[:, fed:position], inference_context=cache)[-1]
        cache.sequence_len_offset = fed = position
        ids[:, position] = _draw(logits, options, generator)
    return ids


def _draw(local_logits: Tensor, options: SamplingOptions, generator: torch.Generator | None) -> Tensor:
    """Chooses the next ids [B] from this rank's part of the logits [B, V / TP]."""
    group = parallel_state.get_tensor_model_parallel_group()
    token = sample_tokens(gather_from_tensor_model_parallel_region(local_logits, group), options, generator)
    # Ranks may round differently or hold another generator state; a single diverging id would garble the rest.
    dist.broadcast(token, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return token
