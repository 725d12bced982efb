"""The command line of generation: continues images and videos with a trained model, with the original's flags."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_mcore.config import RunConfig, load_config, run_dir, validate
from cosmos_mcore.model.presets import check_arch_layout
from cosmos_mcore.parallel.command_line import USER_ERROR, configure_logging
from cosmos_mcore.parallel.launch import is_rank_zero, processes_to_start, run_processes, world_size

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos_mcore.inference.inputs import Item
    from cosmos_mcore.inference.pipeline import Continuation, VideoPipeline
    from cosmos_mcore.inference.sampling import SamplingOptions

logger = logging.getLogger(__name__)

MAX_BATCH = 8  # sequences at a time: their caches (0.8 GB each for 4B, 2.1 GB for 12B) leave room on an 80 GB GPU


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Continue images or videos with a trained model. The flags are those of the original's base.py and "
        "mean the same; a few are new.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("the original's flags").add_argument
    add("--checkpoint_dir", default="checkpoints", help="folder with the downloaded models and the tokenizer")
    add("--ar_model_dir", default="Cosmos-Predict1-4B", help="the model's folder in it")
    add("--input_type", choices=("image", "video"), default="video", help="image: continue from one frame")
    add("--input_image_or_video_path", help="what to continue: an image, or a video's last frames")
    add("--batch_input_path", help='several inputs: a file with {"visual_input": PATH} in each line')
    add("--num_input_frames", type=int, choices=(1, 9), default=9, help="frames of a video to continue from")
    add("--temperature", type=float, default=1.0, help="0: always take the most likely token")
    add("--top_p", type=float, default=0.8, help="draw from the most likely tokens that make up this probability")
    add("--seed", type=int, default=0, help="the same seed gives the same video; each input starts from it")
    add("--num_gpus", type=int, default=1, help="processes that share the model; started here if torchrun has not")
    add("--video_save_name", default="output", help="name of the file, without .mp4; a batch's are 0, 1, ...")
    add("--video_save_folder", default="outputs/", help="folder of the files")
    add("--disable_diffusion_decoder", action="store_true", help="decode with the discrete tokenizer")
    add("--disable_guardrail", action="store_true", help="do not check the videos")
    add("--offload_ar_model", action="store_true", help="keep the model in CPU memory while it does not generate")
    add("--offload_tokenizer", action="store_true", help="load the tokenizer for each use, and free it afterwards")
    for name in ("guardrail_models", "diffusion_decoder"):
        add(f"--offload_{name}", action="store_true", help="accepted: neither is kept on the GPU in this version")
    add = parser.add_argument_group("new flags").add_argument
    add("--checkpoint", help="a checkpoint of any layout, or a run's folder, instead of the downloaded model")
    add("--config", help="the run's YAML file; default: the config.yaml beside the checkpoint")
    add("--height", type=int, help="pixels; default: as trained, 640 for released models")
    add("--width", type=int, help="pixels; default: as trained, 1024 for released models")
    add("--num_frames", type=int, help="of the result; more than the model's clips are chained; default: one clip")
    add("--fps", type=float, help="of the result; default: the input's, 25 for an image")
    add("--top_k", type=int, help="draw from at most this many tokens")
    add("--num_samples", type=int, default=1, help="videos per input, with seeds counted up")
    add("--fp8", action="store_true", help="round the layers' weights to 8 bits: half the memory, faster")
    add(
        "--compare",
        action="store_true",
        help="continue from inside the video, where the truth is known: take the last frames that make up a clip, "
        "continue the first of them, and also write truth, tokenizer round trip and result side by side",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Generates as the command line says.

    Returns:
        The exit code: 0, or 2 if some inputs of a batch were bad.

    Raises:
        ValueError: for a user's mistake.
    """
    args = _parser().parse_args(arguments)
    _check_arguments(args)
    configure_logging()
    # Only now torch, after the mistakes that can be found without it.
    from cosmos_mcore.inference import assemble
    from cosmos_mcore.inference.guardrail import find_guardrail
    from cosmos_mcore.inference.inputs import Failures, Item, Wanted, read_batch_file, read_batches
    from cosmos_mcore.inference.sampling import SamplingOptions
    from cosmos_mcore.parallel.initialize import shut_down

    options = SamplingOptions(args.temperature, args.top_p, args.top_k)
    checkpoint, config_file = _find_model(args)
    arch = assemble.read_arch(checkpoint, config_file)
    config = assemble.share_over_processes(_adapted_config(args, config_file), max(args.num_gpus, world_size()))
    check_arch_layout(config, arch)
    count = processes_to_start(config)
    if count:
        print(f"starting {count} processes (as torchrun --nproc_per_node={count} would)", flush=True)
        return run_processes(count, [sys.argv[0], *arguments])

    failures = Failures()
    if args.batch_input_path is not None:
        items = read_batch_file(Path(args.batch_input_path), failures)
    else:
        items = [Item(Path(args.input_image_or_video_path), args.video_save_name)]
    size = config.data.height, config.data.width, config.data.frame_stride
    wanted = Wanted(_frames_to_read(args, config), *size, video_only=args.compare)
    per_batch = max(1, MAX_BATCH // args.num_samples)
    batches = read_batches(items, wanted, per_batch, failures if args.batch_input_path is not None else None)
    first = next(batches, None)  # a mistake in the first input shall not cost the loading of a model
    if first is None:
        raise ValueError(f"none of the {len(items)} inputs in {args.batch_input_path} can be read")
    if not args.disable_diffusion_decoder and config.tokenizer.name == "dv8x16x16":
        logger.info("the diffusion decoder is not part of this version: decoding with the discrete tokenizer")
    pipeline = assemble.load_pipeline(config, arch, checkpoint, args.fp8, args.offload_ar_model, args.offload_tokenizer)
    guardrail = None if args.disable_guardrail or not is_rank_zero() else find_guardrail(pipeline.device)
    for group, clips in itertools.chain([first], batches):
        for item, number, made, clip in _continue(pipeline, args, options, group, clips):
            video = made.video if guardrail is None else guardrail.check(made.video)
            if video is None:
                failures.add(item.name, "the guardrail blocks this video, so it is not written")
                continue
            name = item.name if args.num_samples == 1 else f"{item.name}_{number}"
            _write(pipeline, args, config, item, name, made, video, clip)
    shut_down()
    # Not on other ranks: the launcher would end the first one, which may still be writing.
    if failures.lines and is_rank_zero():
        logger.error("%d of %d inputs gave no video", len(failures.lines), len(items))
        return USER_ERROR
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    """What can be wrong without a look at any file but the output folder; makes that."""
    if args.input_image_or_video_path is None and args.batch_input_path is None:
        raise ValueError("give --input_image_or_video_path with an image or a video, or --batch_input_path with many")
    for name in ("num_samples", "num_gpus", "num_frames", "fps"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} must be more than 0")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie between 0 and {2**32 - 1}")
    if world_size() > 1 and args.num_gpus not in (1, world_size()):
        raise ValueError(f"--num_gpus {args.num_gpus} does not fit torchrun's {world_size()} processes; leave it away")
    if args.num_samples > MAX_BATCH:
        raise ValueError(f"--num_samples {args.num_samples} is too many at once; give at most {MAX_BATCH}")
    if Path(args.video_save_name).name != args.video_save_name:
        raise ValueError(f"--video_save_name {args.video_save_name} must be a name; --video_save_folder is for folders")
    folder = Path(args.video_save_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror}; change --video_save_folder") from None
    if not writable:
        raise ValueError(f"the folder {folder} cannot be written to; change --video_save_folder")


def _find_model(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The checkpoint, and the config of the run that it is of (None: a released model)."""
    from cosmos_mcore.inference.assemble import find_run_config

    if args.checkpoint is not None:
        checkpoint = Path(args.checkpoint)
    elif args.config is not None:
        checkpoint = run_dir(load_config(args.config))
    else:
        checkpoint = Path(args.checkpoint_dir) / args.ar_model_dir
        if not checkpoint.exists():
            raise ValueError(
                f"there is no model in {checkpoint}; fetch it with scripts/download_autoregressive_checkpoints.py, or "
                "give --checkpoint with a checkpoint or a run's folder"
            )
    return checkpoint, Path(args.config) if args.config is not None else find_run_config(checkpoint)


def _adapted_config(args: argparse.Namespace, config_file: Path | None) -> RunConfig:
    """The config of the model, with the size of clips that the command line asks for."""
    from cosmos_mcore.inference.assemble import check_tokenizer, released_config

    config = released_config(Path(args.checkpoint_dir)) if config_file is None else load_config(config_file)
    config.precision.fp8 = None  # a recipe of training
    for name in ("height", "width"):
        value = getattr(args, name)
        setattr(config.data, name, getattr(config.data, name) if value is None else value)
    validate(config)
    check_tokenizer(config)
    return config


def _frames_to_read(args: argparse.Namespace, config: RunConfig) -> int:
    given: int = 1 if args.input_type == "image" else args.num_input_frames
    if args.num_frames is not None and args.num_frames <= given:
        raise ValueError(f"--num_frames {args.num_frames} leaves nothing to generate after {given} given frames")
    if not args.compare:
        return given
    if args.num_frames is not None and args.num_frames != config.data.num_frames:
        raise ValueError(f"--compare shows one clip of {config.data.num_frames} frames; leave --num_frames away")
    return config.data.num_frames


def _continue(
    pipeline: VideoPipeline, args: argparse.Namespace, options: SamplingOptions, group: list[Item], clips: Tensor
) -> Iterator[tuple[Item, int, Continuation, Tensor]]:
    """Generates all samples of a group at once; yields them, with what was read, on the first rank."""
    given = clips
    if args.compare:
        given = clips[:, :, : 1 if args.input_type == "image" else args.num_input_frames]
    samples = range(args.num_samples)
    seeds = [args.seed + sample for _ in group for sample in samples]
    made = pipeline.continue_videos(given.repeat_interleave(len(samples), 0), options, seeds, args.num_frames)
    for place, video in enumerate(made):
        item = place // len(samples)
        yield group[item], place % len(samples), video, clips[item : item + 1]


def _write(
    pipeline: VideoPipeline,
    args: argparse.Namespace,
    config: RunConfig,
    item: Item,
    name: str,
    made: Continuation,
    video: Tensor,
    clip: Tensor,
) -> None:
    from cosmos_mcore.inference.video_io import frame_rate, write_mp4

    fps = args.fps if args.fps is not None else frame_rate(item.source, config.data.frame_stride)
    folder = Path(args.video_save_folder)
    written = [write_mp4(folder / f"{name}.mp4", video, fps)]
    if args.compare:
        from cosmos_mcore.inference.picture import write_comparison

        rows = {"input": clip[0], "tokenizer round trip": pipeline.round_trip(clip)[0].cpu(), "generated": video}
        written += write_comparison(folder, name, rows, made.num_given, fps)
    for path in written:
        logger.info("wrote %s", path)
