"""The whole system in a few minutes on two CPU cores: train, stop, resume, generate, show.

python scripts/demo.py [--data FOLDER_OF_MP4S] [--output outputs/demo]
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cosmos_mcore.config import load_config
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.synthetic import make_shape_clips
from cosmos_mcore.inference.picture import write_loss_curve
from cosmos_mcore.parallel.command_line import run_command

CONFIG = "conf/tiny_cpu.yaml"


def main(argv: list[str]) -> int:
    """Runs the steps one after the other; what they print goes to the terminal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of MP4 files; default: clips of moving shapes, made on the spot")
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="where everything is written")
    args = parser.parse_args(argv)
    started = time.monotonic()
    config = load_config(CONFIG)

    if args.data is None:
        print("Making clips of moving shapes", flush=True)
        data, size = args.output / "clips", {"height": config.data.height, "width": config.data.width}
        make_shape_clips(data, 960, seed=0, shapes_per_clip=2, **size)
        source = make_shape_clips(args.output / "unseen", 1, seed=1, shapes_per_clip=2, **size)[0]
        overrides = [f"data.path={data}"]
    else:
        data = Path(args.data)
        # Real videos have detail that needs more cells, and are not learnt in minutes anyway: fewer, larger steps.
        overrides = [f"data.path={data}", "data.height=96", "data.width=160", "training.train_iters=120"]
        source = Path(index_clips(load_config(CONFIG, overrides).data).clips[0].path)

    iterations = load_config(CONFIG, overrides).training.train_iters
    run = args.output / "run" / "demo" / "autoregressive_base" / "tiny_cpu"
    shutil.rmtree(run, ignore_errors=True)
    # The first half stops early, but its learning rate falls as in the whole run; the second half resumes it.
    train = ["examples/pretrain_cosmos_ar.py", CONFIG, *overrides, f"schedule.decay_iters={iterations}"]
    execute(args.output, "Training, first half", *train, f"training.train_iters={iterations // 2}")
    execute(args.output, "Training, second half: resumes from the checkpoint", *train)
    generate = ["examples/generate_video.py", "--checkpoint", str(run), "--input_image_or_video_path", str(source)]
    generate += ["--video_save_folder", str(args.output), "--video_save_name", "generated"]
    # Of a model trained this shortly unlikely tokens are mostly wrong ones: at 0.8 one draw in eight loses the picture.
    generate += ["--top_p", "0.5"]
    execute(args.output, "Generating: the model gets 9 frames and continues them", *generate, "--compare")
    write_loss_curve(args.output / "loss_curve.png", run / "metrics.jsonl")

    print(f"\nDone in {time.monotonic() - started:.0f} s. Look at")
    for name, what in (
        ("generated_strip.png", "input, tokenizer round trip and generated frames"),
        ("generated_side_by_side.mp4", "the same as a video (and as a GIF)"),
        ("loss_curve.png", "the loss, and where training was resumed"),
        ("run", "checkpoints, metrics.jsonl, TensorBoard files"),
    ):
        print(f"  {args.output / name}: {what}")
    print("Next, another continuation:")
    print(f"  {shlex.join([sys.executable, *generate, '--seed', '1'])}")
    if args.data is None:
        print("or the same with your own videos:\n  make demo DATA=folder/with/mp4/files")
    return 0


def execute(output: Path, title: str, *command: str) -> None:
    """Runs a Python script with our interpreter; exits with its code if it fails."""
    print(f"\n{title}\n  python {shlex.join(command)}", flush=True)
    # The demo is small enough for CPUs and shows two processes, which one GPU could not host.
    # glibc shall keep the memory of the logits (64,000 ids per token) from step to step: a third of the time on CPUs.
    memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    environment = {**os.environ, **memory, "OUTPUT_ROOT": str(output / "run"), "CUDA_VISIBLE_DEVICES": ""}
    code = subprocess.run([sys.executable, *command], env=environment).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_command(main)
