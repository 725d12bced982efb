"""Which layouts fit on given GPUs, what they hold, and which is fastest: arithmetic, nothing is run.

    python scripts/plan.py --gpus 8x80G --model 12b
    python scripts/plan.py --gpus 4x141G --config conf/teal_tp4.yaml training.global_batch_size=8

See docs/performance.md for what the numbers rest on.
"""

import argparse
from pathlib import Path

from cosmos_mcore.config import derive_video_layout, load_config
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.training.plan import clip_of_tokens, parse_gpus, plans, table

ROOT = Path(__file__).parents[1]


def main(argv: list[str]) -> int:
    """Parses the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", required=True, help="count and memory of each, for example 8x80G")
    parser.add_argument("--model", help=f"preset: {', '.join(PRESETS)}; default: the config's")
    parser.add_argument("--tokens", type=int, help="tokens of a clip, about; default: the config's clip")
    parser.add_argument("--config", help="the run's YAML; default: FP8 with bf16 gradients and moments, 4 clips a GPU")
    parser.add_argument("--top", type=int, default=8, help="layouts to print")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    count, memory = parse_gpus(args.gpus)
    config = _config(args, count)
    found = plans(config, count, memory)
    print(table(config, found, count, memory, args.top))
    return 0 if found else 1


def _config(args: argparse.Namespace, count: int) -> RunConfig:
    keys, path = args.overrides, args.config
    if path is None:
        path = ROOT / "conf" / "teal_tp1.yaml"
        precision = ["precision.fp8=delayed", "precision.main_grads=bf16", "precision.moments=bf16"]
        keys = [*precision, f"training.global_batch_size={4 * count}", *keys]
    if args.model:
        keys = [f"model.preset={args.model}", *keys]
    config = load_config(path, keys)
    if args.tokens is not None:
        latents, *_ = derive_video_layout(config).latent_shape
        config.data.height, config.data.width = clip_of_tokens(args.tokens, latents)
    return config


if __name__ == "__main__":
    run_command(main)
