"""The command line of generation: continues an image or a video with a trained model."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_mcore.checkpoint.pointer import is_distributed, latest_checkpoint
from cosmos_mcore.config import RunConfig, load_config, run_dir
from cosmos_mcore.parallel.command_line import configure_logging
from cosmos_mcore.parallel.launch import is_rank_zero, world_size

if TYPE_CHECKING:
    from cosmos_mcore.inference.pipeline import VideoPipeline

logger = logging.getLogger(__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Continue an image or a video with a trained model. Under torchrun, all processes share the model "
        "(tensor parallelism).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--config", help="the run's YAML file; default: the config.yaml beside the checkpoint")
    add(
        "--checkpoint",
        help="an iter_... folder, or a run's checkpoints folder; default: the newest of the config's run",
    )
    add("--input_image_or_video_path", required=True, help="what to continue: an image, or a video's last frames")
    add("--num_input_frames", type=int, choices=(1, 9), default=9, help="frames of a video to continue from")
    add("--temperature", type=float, default=1.0, help="0: always take the most likely token")
    add("--top_p", type=float, default=0.8, help="draw from the most likely tokens that make up this probability")
    add("--top_k", type=int, help="draw from at most this many tokens")
    add("--seed", type=int, default=0, help="the same seed gives the same video")
    add("--video_save_name", default="output", help="name of the file, without .mp4")
    add("--video_save_folder", default="outputs/", help="folder of the file")
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
        The exit code.

    Raises:
        ValueError: for a user's mistake.
    """
    args = _parser().parse_args(arguments)
    config = _load_run_config(args.config, args.checkpoint)
    configure_logging()
    # Only now torch, after the mistakes that can be found without it.
    from cosmos_mcore.inference.sampling import SamplingOptions
    from cosmos_mcore.inference.video_io import frame_rate, read_conditioning, write_mp4

    options = SamplingOptions(args.temperature, args.top_p, args.top_k)
    data, source = config.data, args.input_image_or_video_path
    wanted = data.num_frames if args.compare else args.num_input_frames
    clip = read_conditioning(source, wanted, data.height, data.width, data.frame_stride)
    if clip.size(2) < wanted and args.compare:
        raise ValueError(f"--compare needs a video, whose frames are the truth, but {source} is an image")
    fps = frame_rate(source, data.frame_stride)
    pipeline = load_pipeline(config, find_checkpoint(args.checkpoint or run_dir(config)))
    made = pipeline.continue_video(clip[:, :, : args.num_input_frames], options, args.seed)
    if is_rank_zero():
        folder, name = Path(args.video_save_folder), args.video_save_name
        written = [write_mp4(folder / f"{name}.mp4", made.video, fps)]
        if args.compare:
            from cosmos_mcore.inference.picture import write_comparison

            rows = {"input": clip[0], "tokenizer round trip": pipeline.round_trip(clip)[0], "generated": made.video}
            written += write_comparison(folder, name, rows, made.num_given, fps)
        for path in written:
            logger.info("wrote %s", path)
    from cosmos_mcore.parallel.initialize import shut_down

    shut_down()
    return 0


def _load_run_config(path: str | None, checkpoint: str | None) -> RunConfig:
    """Loads the config given, else the one that training has left in the folder of the checkpoint's run."""
    if path is not None:
        return load_config(path)
    if checkpoint is None:
        raise ValueError("give --checkpoint with a folder of a trained run, or --config with the YAML file of one")
    for folder in (Path(checkpoint), *Path(checkpoint).absolute().parents[:2]):
        if (folder / "config.yaml").is_file():
            return load_config(folder / "config.yaml")
    raise ValueError(
        f"there is no config.yaml beside the checkpoint {checkpoint}; give --config with the run's YAML file"
    )


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user means.

    Args:
        path: a checkpoint of any layout, or the folder of a run or of its checkpoints, which stands for the newest one.

    Raises:
        ValueError: if there is none.
    """
    path = Path(path)
    if is_distributed(path) or path.is_file():
        return path
    newest = latest_checkpoint(path) or latest_checkpoint(path / "checkpoints")
    if newest is None:
        raise ValueError(f"there is no checkpoint in {path}; train first, or give --checkpoint with an iter_... folder")
    return newest


def load_pipeline(config: RunConfig, checkpoint: Path) -> VideoPipeline:
    """Builds the run's model for generation: all processes share it by tensor parallelism, however it was trained.

    Args:
        config: the run's.
        checkpoint: of any layout.

    Raises:
        ValueError: if the model cannot be cut over the processes, or the checkpoint is of another model.
    """
    from cosmos_mcore.checkpoint.load import load_any_weights
    from cosmos_mcore.config import derive_video_layout
    from cosmos_mcore.inference.pipeline import VideoPipeline
    from cosmos_mcore.model.builder import build_model
    from cosmos_mcore.model.presets import resolve_arch
    from cosmos_mcore.parallel.initialize import initialize
    from cosmos_mcore.parallel.layout import check_layout
    from cosmos_mcore.tokenizer.build import build_tokenizer

    parallel = replace(
        config.parallel,
        tensor_model_parallel_size=world_size(),
        sequence_parallel=False,
        pipeline_model_parallel_size=1,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        virtual_pipeline_model_parallel_size=None,
        context_parallel_size=1,
    )
    config = replace(config, parallel=parallel)
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    check_layout(
        config,
        num_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        ffn_hidden_size=arch.ffn_hidden_size,
        vocab_size=arch.vocab_size,
    )
    device = initialize(parallel, config.training.seed)
    chunks = build_model(config, arch, layout, device)
    logger.info("loading weights from %s", checkpoint)
    load_any_weights(checkpoint, arch, chunks)
    return VideoPipeline(chunks[0].eval(), build_tokenizer(config, device), layout)
