"""The arguments of generation's command line, and what can be wrong with them before any file is read."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.parallel.launch import world_size

MAX_BATCH = 8  # sequences at a time: their caches (0.8 GB each for 4B, 2.1 GB for 12B) leave room on an 80 GB GPU
BASE_MODEL, TEXT_MODEL = "Cosmos-Predict1-4B", "Cosmos-Predict1-5B-Video2World"  # the original's defaults
SLOWEST_FPS, FASTEST_FPS = 0.01, 1000  # that files can say
_LONGEST_NAME = 200  # bytes: file systems take 255, and what is written gets endings
_WITH_TEXT = "text_and_"


def make_parser() -> argparse.ArgumentParser:
    """The flags of the original's base.py and video2world.py, which mean the same, and a few more."""
    parser = argparse.ArgumentParser(
        description="Continue images or videos with a trained model. The flags are those of the original's base.py and "
        "video2world.py and mean the same; a few are new.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    original = parser.add_argument_group("the original's flags")
    new = parser.add_argument_group("new flags")
    add_model_arguments(original, new)
    add = original.add_argument
    add(
        "--input_type",
        choices=("image", "video", _WITH_TEXT + "image", _WITH_TEXT + "video"),
        help="what the input is, image: continue from one frame; by default video, and text with it where the model "
        "reads text",
    )
    add("--input_image_or_video_path", help="what to continue: an image, or a video's last frames")
    add("--prompt", help="what the video shows, for Video2World models")
    add(
        "--batch_input_path",
        help='several inputs: a file with {"visual_input": PATH} in each line, and "prompt": TEXT for Video2World '
        "models",
    )
    add("--num_input_frames", type=int, choices=(1, 9), default=9, help="frames of a video to continue from")
    add("--temperature", type=float, default=1.0, help="0: always take the most likely token")
    add("--top_p", type=float, default=0.8, help="draw from the most likely tokens that make up this probability")
    add("--seed", type=int, default=0, help="the same seed gives the same video; each input starts from it")
    add("--num_gpus", type=int, default=1, help="processes that share the work; started here if torchrun has not")
    add("--video_save_name", default="output", help="name of the file, without .mp4; a batch's are 0, 1, ...")
    add("--video_save_folder", default="outputs/", help="folder of the files")
    add("--offload_text_encoder_model", action="store_true", help="accepted: it is always freed before the model comes")
    add("--offload_guardrail_models", action="store_true", help="accepted: they are small and stay")
    add = new.add_argument
    add("--num_frames", type=int, help="of the result; more than the model's clips are chained; default: one clip")
    add("--fps", type=float, help="of the result; default: the input's, 25 for an image")
    add("--top_k", type=int, help="draw from at most this many tokens")
    add("--num_samples", type=int, default=1, help="videos per input, with seeds counted up")
    add(
        "--compare",
        action="store_true",
        help="continue from inside the video, where the truth is known: take the last frames that make up a clip, "
        "continue the first of them, and also write truth, tokenizer round trip and result side by side",
    )
    return parser


def add_model_arguments(original: argparse._ArgumentGroup, new: argparse._ArgumentGroup) -> None:
    """The flags that say which model it is and where its parts are kept: the original's, and ours."""
    add = original.add_argument
    add("--checkpoint_dir", default="checkpoints", help="folder with the downloaded models, tokenizers and decoder")
    add("--ar_model_dir", help=f"the model's folder in it; by default {BASE_MODEL}, with a prompt {TEXT_MODEL}")
    add("--disable_diffusion_decoder", action="store_true", help="make the frames with the discrete tokenizer")
    add("--disable_guardrail", action="store_true", help="do not check prompts and videos")
    add("--offload_ar_model", action="store_true", help="keep the model in CPU memory while it does not generate")
    add("--offload_tokenizer", action="store_true", help="load the tokenizer for each use, and free it afterwards")
    add("--offload_diffusion_decoder", action="store_true", help="keep it in CPU memory while it makes no frames")
    add = new.add_argument
    add("--checkpoint", help="a checkpoint of any layout, or a run's folder, instead of the downloaded model")
    add("--config", help="the run's YAML file; default: the config.yaml beside the checkpoint")
    add("--height", type=int, help="pixels; default: as trained, 640 for released models")
    add("--width", type=int, help="pixels; default: as trained, 1024 for released models")
    add("--fp8", action="store_true", help="round the layers' weights to 8 bits: half the memory, faster")


def stay_offline() -> None:
    """Has the hub's packages take what is in its cache and download nothing, unless the user's environment says other.

    The guardrail's weights are many gigabytes, behind a licence that has to be agreed to. The packages look when they
    are imported, by the text encoder's and the page's package, too: this comes before.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def check_arguments(args: argparse.Namespace) -> None:
    """What can be wrong without a look at any file but the output folder; makes that.

    Raises:
        ValueError: naming the flag.
    """
    if args.input_image_or_video_path is None and args.batch_input_path is None:
        raise ValueError("give --input_image_or_video_path with an image or a video, or --batch_input_path with many")
    if args.input_image_or_video_path is not None and args.batch_input_path is not None:
        raise ValueError("--input_image_or_video_path and --batch_input_path both name inputs: give one of them")
    if args.batch_input_path is not None and args.prompt is not None:
        raise ValueError('the prompts of a batch are in its lines, as "prompt": leave --prompt away')
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt is empty; say what the video shows")
    for name in ("num_samples", "num_gpus", "num_frames"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} must be more than 0")
    if args.fps is not None and not SLOWEST_FPS <= args.fps <= FASTEST_FPS:
        raise ValueError(f"--fps {args.fps} must lie between {SLOWEST_FPS} and {FASTEST_FPS}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie between 0 and {2**32 - 1}")
    if world_size() > 1 and args.num_gpus not in (1, world_size()):
        raise ValueError(f"--num_gpus {args.num_gpus} does not fit torchrun's {world_size()} processes; leave it away")
    if args.num_samples > MAX_BATCH:
        raise ValueError(f"--num_samples {args.num_samples} is too many at once; give at most {MAX_BATCH}")
    if not args.video_save_name or Path(args.video_save_name).name != args.video_save_name:
        raise ValueError(
            f"--video_save_name {args.video_save_name!r} must be a name; --video_save_folder is for folders"
        )
    if len(os.fsencode(args.video_save_name)) > _LONGEST_NAME:
        raise ValueError(f"--video_save_name is too long for a file's name; give at most {_LONGEST_NAME} characters")
    folder = Path(args.video_save_folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise ValueError(f"the folder {folder} cannot be made: {error.strerror}; change --video_save_folder") from None
    if not writable:
        raise ValueError(f"the folder {folder} cannot be written to; change --video_save_folder")


def model_folder(args: argparse.Namespace) -> Path:
    """The folder of the downloaded model: a Video2World model where the arguments speak of text."""
    name = args.ar_model_dir
    if name is None:
        name = TEXT_MODEL if args.prompt is not None or _speaks_of_text(args) else BASE_MODEL
    return Path(args.checkpoint_dir) / name


def given_frames(args: argparse.Namespace) -> int:
    """How many frames of the input are continued."""
    number: int = 1 if args.input_type in ("image", _WITH_TEXT + "image") else args.num_input_frames
    return number


def check_prompt(args: argparse.Namespace, arch: ModelArch, checkpoint: Path) -> None:
    """Whether there is a prompt if, and only if, the model reads text.

    Raises:
        ValueError: saying which way it is wrong.
    """
    if not arch.text_to_video and (args.prompt is not None or _speaks_of_text(args)):
        raise ValueError(
            f"{checkpoint} reads no text: leave --prompt and {_WITH_TEXT}... away, or take a Video2World model "
            f"(--ar_model_dir {TEXT_MODEL})"
        )
    if arch.text_to_video and args.prompt is None and args.batch_input_path is None:
        raise ValueError(f"{checkpoint} is a Video2World model: say with --prompt what the video shows")


def _speaks_of_text(args: argparse.Namespace) -> bool:
    return args.input_type is not None and args.input_type.startswith(_WITH_TEXT)
