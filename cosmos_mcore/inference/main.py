"""The command line of generation: continues images and videos with a trained model, with the original's flags."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_mcore.config import RunConfig, derive_video_layout, load_config, run_dir, validate
from cosmos_mcore.config.derived import prompt_cache_dir
from cosmos_mcore.config.schema import PrecisionConfig
from cosmos_mcore.inference.arguments import (
    MAX_BATCH,
    check_arguments,
    check_prompt,
    given_frames,
    make_parser,
    model_folder,
    stay_offline,
)
from cosmos_mcore.model.presets import ModelArch, check_arch_layout
from cosmos_mcore.parallel.command_line import USER_ERROR, configure_logging
from cosmos_mcore.parallel.imports import lasting_imports
from cosmos_mcore.parallel.launch import is_rank_zero, processes_to_start, run_processes, world_size

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from cosmos_mcore.inference.inputs import Item
    from cosmos_mcore.inference.pipeline import Continuation, VideoPipeline
    from cosmos_mcore.inference.prompts import PromptSource
    from cosmos_mcore.inference.sampling import SamplingOptions

logger = logging.getLogger(__name__)

_TEXT_ENCODER = Path("google-t5", "t5-11b")  # in the folder of downloads, as on the hub


@dataclass(frozen=True)
class _Result:
    """One video to write.

    Attributes:
        item: its input.
        name: of the file, without suffix.
        made: what was generated.
        clip: what was read [1, 3, T, H, W].
        round_trip: the same, encoded and decoded, if it is to be compared.
    """

    item: Item
    name: str
    made: Continuation
    clip: Tensor
    round_trip: Tensor | None


def main(arguments: list[str]) -> int:
    """Generates as the command line says.

    Returns:
        The exit code: 0, or 2 if some inputs of a batch were bad.

    Raises:
        ValueError: for a user's mistake.
    """
    args = make_parser().parse_args(arguments)
    check_arguments(args)
    configure_logging()
    stay_offline()
    # Only now torch, after the mistakes that can be found without it.
    with lasting_imports():
        from cosmos_mcore.inference import assemble
        from cosmos_mcore.inference.guardrail import blocked_prompts, find_guardrail
        from cosmos_mcore.inference.inputs import (
            Failures,
            Item,
            Wanted,
            check_outputs,
            read_batch_file,
            read_batches,
        )
        from cosmos_mcore.inference.sampling import SamplingOptions
        from cosmos_mcore.parallel.initialize import shut_down

    options = SamplingOptions(args.temperature, args.top_p, args.top_k)
    checkpoint, config_file = find_model(args)
    arch = assemble.read_arch(checkpoint, config_file)
    check_prompt(args, arch, checkpoint)
    config = assemble.share_over_processes(adapted_config(args, config_file), max(args.num_gpus, world_size()))
    check_arch_layout(config, arch)
    check_decoder(args, config)
    if args.compare and args.num_frames not in (None, config.data.num_frames):
        raise ValueError(f"--compare shows one clip of {config.data.num_frames} frames; leave --num_frames away")
    missing = processes_to_start(config)
    if missing:
        print(f"starting {missing} processes (as torchrun --nproc_per_node={missing} would)", flush=True)
        return run_processes(missing, [sys.argv[0], *arguments])

    batch = args.batch_input_path is not None
    failures = Failures()
    if batch:
        items = read_batch_file(Path(args.batch_input_path), arch.text_to_video, failures)
    else:
        items = [Item(Path(args.input_image_or_video_path), args.video_save_name, args.prompt and args.prompt.strip())]
    count = len(items) + len(failures.lines)  # bad lines, too
    source = prompt_source(args, config)
    prompts = [item.prompt for item in items if item.prompt is not None]
    source.check(prompts)
    check_outputs(items, Path(args.video_save_folder), args.num_samples)
    layout = derive_video_layout(config, begin_of_video=arch.text_to_video)
    wanted = Wanted(layout, config.data.frame_stride, given_frames(args), args.num_frames, args.compare)
    per_batch = max(1, MAX_BATCH // args.num_samples)
    batches = read_batches(items, wanted, per_batch, failures if batch else None)
    first = next(batches, None)  # a mistake in the first input shall not cost the loading of a model
    if first is None:
        raise ValueError(f"none of the {count} inputs in {args.batch_input_path} can be read")
    with full_memory_told(args, config.parallel.tensor_model_parallel_size, arch):
        device, group = assemble.join_processes(config)
        checks = is_rank_zero() and not args.disable_guardrail
        guardrail = find_guardrail(device, arch.text_to_video) if checks else None
        blocked = blocked_prompts(guardrail, prompts, device, group)
        allowed = [prompt for prompt in prompts if prompt not in blocked]
        if blocked and not allowed:
            which = "every prompt" if batch else "this prompt"
            raise ValueError(f"the guardrail blocks {which}, so nothing is generated")
        for item in items:
            if item.prompt in blocked:
                failures.add(item.name, "the guardrail blocks this prompt, so no video is made of it")
        texts = source.embed(allowed, device, group) if allowed else {}
        pipeline = load_pipeline(args, config, arch, checkpoint, device, group)
        written = 0
        for inputs, clips in itertools.chain([first], batches):
            good = [number for number, item in enumerate(inputs) if item.prompt not in blocked]
            if not good:
                continue
            inputs, clips = [inputs[number] for number in good], clips[good]
            for result in _continue(pipeline, args, options, inputs, clips, texts):
                video = result.made.video if guardrail is None else guardrail.check(result.made.video)
                if video is None:
                    failures.add(result.name, "the guardrail blocks this video, so it is not written")
                    continue
                _write(args, result, video)
                written += 1
    shut_down()
    # Not on other ranks: the launcher would end the first one, which may still be writing.
    if failures.lines and is_rank_zero():
        videos = count * args.num_samples
        logger.error("%d of %d videos were not written", videos - written, videos)
        return USER_ERROR
    return 0


@contextmanager
def full_memory_told(args: argparse.Namespace, gpus: int, arch: ModelArch) -> Iterator[None]:
    """Turns a full GPU within the block into a mistake that names what helps and is not used yet.

    Raises:
        ValueError: then.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        flags = ["--offload_ar_model", "--offload_tokenizer", "--fp8"]
        if not args.disable_diffusion_decoder:
            flags.insert(0, "--offload_diffusion_decoder")
        unused = [flag for flag in flags if not getattr(args, flag.removeprefix("--"))]
        more = [f"--num_gpus {2 * gpus}"] if 2 * gpus <= arch.num_query_groups else []
        helps = ", ".join([*unused, *more, "fewer videos at once, or smaller ones"])
        raise ValueError(f"the GPU's memory is full ({str(error).split('. GPU')[0]}); what helps: {helps}") from error


def find_model(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The checkpoint, and the config of the run that it is of (None: a released model)."""
    from cosmos_mcore.inference.assemble import find_run_config

    if args.checkpoint is not None:
        checkpoint = Path(args.checkpoint)
    elif args.config is not None and args.ar_model_dir is None:
        checkpoint = run_dir(load_config(args.config))
    else:
        checkpoint = model_folder(args)
        if not checkpoint.exists():
            raise ValueError(
                f"there is no model in {checkpoint}; fetch it with scripts/download_autoregressive_checkpoints.py, or "
                "give --checkpoint with a checkpoint or a run's folder"
            )
    return checkpoint, Path(args.config) if args.config is not None else find_run_config(checkpoint)


def adapted_config(args: argparse.Namespace, config_file: Path | None) -> RunConfig:
    """The config of the model, with the size of clips that the command line asks for."""
    from cosmos_mcore.inference.assemble import check_tokenizer, released_config

    config = released_config(Path(args.checkpoint_dir)) if config_file is None else load_config(config_file)
    config.precision = PrecisionConfig(dtype=config.precision.dtype)  # the rest is how training computed
    for name in ("height", "width"):
        value = getattr(args, name)
        setattr(config.data, name, getattr(config.data, name) if value is None else value)
    validate(config)
    check_tokenizer(config, config_file)
    return config


def prompt_source(args: argparse.Namespace, config: RunConfig) -> PromptSource:
    """Where prompts become embeddings."""
    from cosmos_mcore.inference.prompts import PromptSource

    return PromptSource(Path(args.checkpoint_dir) / _TEXT_ENCODER, prompt_cache_dir(config))


def load_pipeline(
    args: argparse.Namespace,
    config: RunConfig,
    arch: ModelArch,
    checkpoint: Path,
    device: torch.device,
    group: dist.ProcessGroup,
) -> VideoPipeline:
    """``assemble.load_pipeline`` as the command line says."""
    from cosmos_mcore.inference import assemble

    return assemble.load_pipeline(
        config,
        arch,
        checkpoint,
        device,
        group,
        fp8=args.fp8,
        offload_network=args.offload_ar_model,
        offload_tokenizer=args.offload_tokenizer,
        decoder_folder=Path(args.checkpoint_dir) if _wants_decoder(args, config) else None,
        offload_decoder=args.offload_diffusion_decoder,
    )


def _wants_decoder(args: argparse.Namespace, config: RunConfig) -> bool:
    """Whether the diffusion decoder makes the frames: it knows the ids of one tokenizer only."""
    return not args.disable_diffusion_decoder and config.tokenizer.name == "dv8x16x16"


def check_decoder(args: argparse.Namespace, config: RunConfig) -> None:
    """Looks whether the diffusion decoder can make the frames, if it is to.

    Raises:
        ValueError: if not.
    """
    if not _wants_decoder(args, config):
        return
    from cosmos_mcore.inference.diffusion.decoder import check_processes
    from cosmos_mcore.inference.diffusion.weights import check_files

    check_files(Path(args.checkpoint_dir))
    check_processes(config.parallel.tensor_model_parallel_size)


def _continue(
    pipeline: VideoPipeline,
    args: argparse.Namespace,
    options: SamplingOptions,
    items: list[Item],
    clips: Tensor,
    texts: Mapping[str, Tensor],
) -> Iterator[_Result]:
    """Generates all samples of some inputs at once; yields them on the first rank, nothing on others."""
    import torch

    from cosmos_mcore.inference.inputs import output_names

    text = torch.stack([texts[item.prompt] for item in items if item.prompt is not None]) if texts else None
    given = clips[:, :, : given_frames(args)] if args.compare else clips
    samples = args.num_samples
    seeds = [args.seed + sample for _ in items for sample in range(samples)]
    each_text = None if text is None else text.repeat_interleave(samples, 0)
    made = pipeline.continue_videos(given.repeat_interleave(samples, 0), options, seeds, args.num_frames, each_text)
    rows = [slice(row, row + 1) for row in range(len(items))]
    round_trips = [
        pipeline.round_trip(clips[row], args.seed, None if text is None else text[row]) if args.compare else None
        for row in rows
    ]
    for place, video in enumerate(made):
        number, sample = divmod(place, samples)
        name = output_names(items[number], samples)[sample]
        yield _Result(items[number], name, video, clips[rows[number]], round_trips[number])


def _write(args: argparse.Namespace, result: _Result, video: Tensor) -> None:
    """Writes one result; ``video`` is what the guardrail has left of it.

    Raises:
        ValueError: if the folder cannot be written to any more.
    """
    from cosmos_mcore.inference.video_io import write_mp4

    fps = args.fps if args.fps is not None else result.item.rate
    folder = Path(args.video_save_folder)
    try:
        written = [write_mp4(folder / f"{result.name}.mp4", video, fps)]
        if result.round_trip is not None:
            from cosmos_mcore.inference.picture import write_comparison

            rows = {"input": result.clip[0], "tokenizer round trip": result.round_trip[0], "generated": video}
            written += write_comparison(folder, result.name, rows, result.made.num_given, fps)
    except OSError as error:
        raise ValueError(f"{result.name} cannot be written to {folder}: {error.strerror or error}") from None
    for path in written:
        logger.info("wrote %s", path)
