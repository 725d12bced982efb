"""From a checkpoint to a pipeline: which config and model it is, and the network over this run's processes."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from cosmos_mcore.checkpoint.architecture import describe
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.config import RunConfig, derive_video_layout, load_config
from cosmos_mcore.config.derived import user_path
from cosmos_mcore.inference.diffusion.decoder import DiffusionDecoder
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.weights import load_weights
from cosmos_mcore.model.builder import DTYPES
from cosmos_mcore.model.presets import ModelArch, resolve_arch
from cosmos_mcore.parallel.initialize import initialize
from cosmos_mcore.tokenizer.build import build_tokenizer

logger = logging.getLogger(__name__)

# What the released models were trained on (spec/inference.md section 2), and where their tokenizer is downloaded to.
RELEASED_SIZE = (33, 640, 1024)
RELEASED_TOKENIZER = "Cosmos-Tokenize1-DV8x16x16-720p"
_FP8_CAPABILITY = (8, 9)  # of the oldest GPUs that have such numbers
CHECKPOINTS = "checkpoints"  # the folder of a run that holds its checkpoints


def find_run_config(checkpoint: Path) -> Path | None:
    """The config of a checkpoint: beside it, or in the folder of the run whose checkpoint it is; None without one."""
    checkpoint = checkpoint.absolute()
    folders = [checkpoint if checkpoint.is_dir() else checkpoint.parent]
    # RUN/checkpoints/iter_..., but not checkpoints/MODEL, where the folder above may be anything.
    if checkpoint.name == CHECKPOINTS:
        folders.append(checkpoint.parent)
    elif checkpoint.parent.name == CHECKPOINTS and checkpoint.name.startswith("iter_"):
        folders.append(checkpoint.parents[1])
    return next((folder / "config.yaml" for folder in folders if (folder / "config.yaml").is_file()), None)


def released_config(checkpoint_dir: Path) -> RunConfig:
    """The config that the released models stand for: they come with none that says it."""
    config = RunConfig()
    config.data.num_frames, config.data.height, config.data.width = RELEASED_SIZE
    config.tokenizer.name = "dv8x16x16"
    config.tokenizer.path = str(checkpoint_dir / RELEASED_TOKENIZER)
    return config


def check_tokenizer(config: RunConfig, config_file: Path | None) -> None:
    """Checks that the tokenizer's files are there, before a model is loaded.

    Args:
        config: names the tokenizer.
        config_file: the run's; None: ``config`` is that of a released model.

    Raises:
        ValueError: if not.
    """
    path = config.tokenizer.path
    if config.tokenizer.name == "haar" or path is None:
        return
    if all((user_path(path) / name).is_file() for name in ("encoder.jit", "decoder.jit")):
        return
    if config_file is not None:
        advice = f"set tokenizer.path in {config_file} to the folder that it is in"
    else:
        advice = (
            "give --checkpoint_dir with the folder that it is in; or, if this is no released model, --config with the "
            "YAML file that it was trained with"
        )
    raise ValueError(
        f"there is no tokenizer in {path}; fetch it with scripts/download_autoregressive_checkpoints.py, or {advice}"
    )


def read_arch(checkpoint: Path, config_file: Path | None) -> ModelArch:
    """The model in a checkpoint.

    Args:
        checkpoint: of any layout. A released model's size in its name (``Cosmos-Predict1-4B``) must be right.
        config_file: of the run, whose model the checkpoint must hold; None: whatever it holds.

    Raises:
        ValueError: if there is no checkpoint, it is damaged, or of another size.
    """
    size = re.search(r"Predict1-(4B|5B|12B|13B)\b", checkpoint.name)
    found = open_checkpoint(checkpoint, size[1] if size else "auto").arch
    if config_file is not None:
        configured = resolve_arch(load_config(config_file).model)
        if found != configured:
            raise ValueError(
                f"{checkpoint} holds another model ({describe(found)}) than {config_file} ({describe(configured)}); "
                "give the checkpoint's own --config"
            )
    return found


def share_over_processes(config: RunConfig, processes: int) -> RunConfig:
    """The config with the model cut over all processes by tensor parallelism, however it was trained."""
    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=processes,
        sequence_parallel=False,
        pipeline_model_parallel_size=1,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
    )
    return replace(config, parallel=parallel)


def join_processes(config: RunConfig) -> tuple[torch.device, dist.ProcessGroup]:
    """Joins the processes of ``share_over_processes``; returns this rank's device and the group of all."""
    device = initialize(config.parallel, config.training.seed)
    return device, parallel_state.get_tensor_model_parallel_group()


def load_pipeline(
    config: RunConfig,
    arch: ModelArch,
    checkpoint: Path,
    device: torch.device,
    group: dist.ProcessGroup,
    *,
    fp8: bool = False,
    offload_network: bool = False,
    offload_tokenizer: bool = False,
    decoder_folder: Path | None = None,
    offload_decoder: bool = False,
) -> VideoPipeline:
    """Loads the model and what makes frames of its ids.

    Args:
        config: of ``share_over_processes``.
        arch: the model.
        checkpoint: of any layout.
        device: of ``join_processes``.
        group: of ``join_processes``.
        fp8: as ``load_weights`` and ``DiffusionDecoder.from_folder``.
        offload_network: as ``VideoPipeline``.
        offload_tokenizer: as ``VideoPipeline``.
        decoder_folder: of released models, with the diffusion decoder; None: the tokenizer makes the frames.
        offload_decoder: as ``DiffusionDecoder.from_folder``.

    Raises:
        ValueError: if a file is damaged or of another model, or the GPU has no 8-bit numbers for ``fp8``.
    """
    if fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"--fp8 needs a GPU of compute capability 8.9 or newer, which {name} is not; leave it away")
    decoder = None
    if decoder_folder is not None:  # first: what is parked makes room for the model
        logger.info("loading the diffusion decoder from %s", decoder_folder)
        decoder = DiffusionDecoder.from_folder(decoder_folder, device, group, fp8=fp8, offload=offload_decoder)
    layout = derive_video_layout(config, begin_of_video=arch.text_to_video)
    logger.info("loading weights (%s) from %s", describe(arch), checkpoint)
    weights = load_weights(checkpoint, arch, device, DTYPES[config.precision.dtype], fp8)
    network = CachedNetwork(weights, arch, layout, group)
    return VideoPipeline(network, lambda: build_tokenizer(config, device), offload_network, offload_tokenizer, decoder)
