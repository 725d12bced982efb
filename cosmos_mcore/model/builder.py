"""From the run's config to the model chunks of this rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import ParallelConfig, PrecisionConfig, RunConfig
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.cross_attention import PositionTable
from cosmos_mcore.model.layer_specs import Text, block_spec
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.parallel.layout import pipeline_split

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _leave(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _recompute(parallel: ParallelConfig, num_layers: int) -> dict[str, Any]:
    if parallel.recompute_granularity == "full":
        return {
            "recompute_granularity": "full",
            # The first so many layers of a stage, so one number goes from nothing to everything. Stages may differ in
            # size, so everything is more than any of them has.
            "recompute_method": "block",
            "recompute_num_layers": parallel.recompute_num_layers or num_layers,
            # Who recomputes is short of memory: FP8 weights are made again too, instead of kept (2 bytes a weight).
            "disable_parameter_transpose_cache": True,
        }
    if parallel.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}


def _fp8(precision: PrecisionConfig) -> dict[str, Any]:
    if precision.fp8 is None:
        return {}
    first, last = precision.fp8_first_last_bf16
    return {
        "fp8": "hybrid",
        "fp8_recipe": precision.fp8,
        # Delayed scaling: each tensor's scale comes from the largest value of the last so many steps.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def transformer_config(
    arch: ModelArch,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    transformer_engine: bool,
) -> TransformerConfig:
    """Megatron's config of the model.

    Args:
        arch: the sizes.
        parallel: the layout.
        precision: of parameters, activations and matrix products.
        transformer_engine: whether the layers are Transformer Engine's (GPUs) or local ones.
    """
    dtype = DTYPES[precision.dtype]
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    split = pipeline_split(parallel, arch.num_layers)
    return TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=arch.layernorm_epsilon,
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        autocast_dtype=dtype if dtype is not torch.float32 else None,
        # Weights are set after construction, equally in every layout (checkpoint/load.py). Initialisation itself must
        # stay on: it also marks the parameters as tensor-parallel, which clipping and loading go by.
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        use_cpu_initialization=not transformer_engine,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        account_for_embedding_in_pipeline_split=split.embedding_counts,
        account_for_loss_in_pipeline_split=split.head_counts,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        **_recompute(parallel, arch.num_layers),
        # Interleaved schedules with batched point-to-point calls give wrong gradients on gloo without an error.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,  # a wait for the device that PyTorch needed until 1.13 (pytorch#82450)
        deallocate_pipeline_outputs=transformer_engine or not interleaved,
        # Fused kernels exist on GPUs only.
        gradient_accumulation_fusion=transformer_engine,
        masked_softmax_fusion=False,
        bias_dropout_fusion=transformer_engine,
        bias_activation_fusion=transformer_engine,
        apply_rope_fusion=transformer_engine,
        persist_layer_norm=transformer_engine,
        attention_backend=AttnBackend.auto if transformer_engine else AttnBackend.unfused,
        attention_softmax_in_fp32=True,
        **_fp8(precision),
    )


def build_model(config: RunConfig, arch: ModelArch, layout: VideoLayout, device: torch.device) -> list[CosmosARModel]:
    """Builds the model chunks of this rank (several only with virtual pipeline stages), weights not yet set.

    Raises:
        ValueError: on a GPU without Transformer Engine.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:
        try:
            import transformer_engine.pytorch  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"Transformer Engine cannot be imported ({error}); install the gpu extra or use an NGC container"
            ) from None
    check_fp8(config.precision.fp8, device)
    megatron_config = transformer_config(arch, config.parallel, config.precision, transformer_engine=on_gpu)
    virtual_stages = config.parallel.virtual_pipeline_model_parallel_size
    text = None
    if arch.context_size is not None:
        table = PositionTable(arch.hidden_size, layout)
        text = Text(arch.context_size, table)

    def chunk(vp_stage: int | None) -> CosmosARModel:
        on_stage: Callable[..., Any] = lambda check: check(ignore_virtual=False, vp_stage=vp_stage)  # noqa: E731
        return CosmosARModel(
            megatron_config,
            arch,
            block_spec(megatron_config, on_gpu, vp_stage, text),
            layout,
            pre_process=on_stage(parallel_state.is_pipeline_first_stage),
            post_process=on_stage(parallel_state.is_pipeline_last_stage),
            vp_stage=vp_stage,
        ).to(device)

    return [chunk(stage) for stage in (range(virtual_stages) if virtual_stages else [None])]


# Compute capabilities that have the recipe's number formats and products: from the first on, before the second.
_FP8_CAPABILITIES = {
    "delayed": ((8, 9), (99, 0)),
    "tensorwise": ((8, 9), (99, 0)),
    "blockwise": ((9, 0), (99, 0)),
    "mxfp8": ((10, 0), (12, 0)),
}


def check_fp8(recipe: str | None, device: torch.device) -> None:
    """Checks that a device can compute in an FP8 recipe, by Transformer Engine's rules.

    Raises:
        ValueError: naming the device.
    """
    if recipe is None or device.type == "meta":
        return
    if device.type == "cpu":
        raise ValueError(f"precision.fp8={recipe} needs a GPU; set it to null")
    capability = torch.cuda.get_device_capability(device)
    first, beyond = _FP8_CAPABILITIES[recipe]
    if not first <= capability < beyond:
        raise ValueError(
            f"precision.fp8={recipe} does not run on {torch.cuda.get_device_name(device)}, compute capability "
            f"{capability[0]}.{capability[1]}; choose another recipe, or null"
        )
    cuda = tuple(int(part) for part in str(torch.version.cuda).split(".")[:2])
    if recipe == "blockwise" and cuda < (12, 9):
        raise ValueError(f"precision.fp8=blockwise needs CUDA 12.9, and torch has {torch.version.cuda}; choose another")
