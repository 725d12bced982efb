"""Which layouts fit on given GPUs, what they hold, and which is fastest: arithmetic, nothing is run.

    python scripts/plan.py --gpus 8x80G --model 12b
    python scripts/plan.py --gpus 4x141G --config conf/teal_tp4.yaml training.global_batch_size=8

See docs/performance.md for what the numbers rest on.
"""

import argparse
from pathlib import Path

from cosmos_mcore.config import load_config
from cosmos_mcore.config.derived import data_parallel_size, derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.training.plan import Plan, clip_of_tokens, parse_gpus, plans

ROOT = Path(__file__).parents[1]


def overrides(plan: Plan) -> str:
    """What to write behind the config's name for this layout."""
    parallel, keys = plan.config.parallel, []
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        keys.append(f"parallel.{name}={getattr(parallel, name)}")
    keys.append(f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}")
    keys.append(f"parallel.recompute_granularity={parallel.recompute_granularity or 'null'}")
    return " ".join(keys)


def main(argv: list[str]) -> int:
    """Parses the arguments and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", required=True, help="count and memory of each, for example 8x80G")
    parser.add_argument("--model", help="preset: 1b, 4b, 12b, 5b or 13b; default: the config's")
    parser.add_argument("--tokens", type=int, help="tokens of a clip, about; default: the config's clip")
    parser.add_argument("--config", help="the run's YAML; default: FP8 with bf16 gradients and moments, 4 clips a GPU")
    parser.add_argument("--top", type=int, default=8, help="layouts to print")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    count, memory = parse_gpus(args.gpus)
    config = _config(args, count)
    layout, arch = derive_video_layout(config), resolve_arch(config.model)
    print(
        f"{config.model.preset}, {config.data.num_frames} frames of {config.data.height}x{config.data.width}: "
        f"{layout.sequence_length} tokens; {config.training.global_batch_size} clips a step on {count} GPUs of "
        f"{memory / 2**30:.0f} GiB"
    )
    found = plans(config, count, memory)
    if not found:
        print(f"no layout fits: the {arch.num_layers}-layer model needs more GPUs, or GPUs with more memory")
        return 1
    print(f"{'TP':>3} {'PP':>3} {'CP':>3} {'DP':>3}  {'recompute':10} {'GB':>6} {'ms/step':>8} {'tokens/s/GPU':>13}")
    for plan in found[: args.top]:
        parallel = plan.config.parallel
        print(
            f"{parallel.tensor_model_parallel_size:3} {parallel.pipeline_model_parallel_size:3} "
            f"{parallel.context_parallel_size:3} {data_parallel_size(plan.config, count):3}  "
            f"{parallel.recompute_granularity or '-':10} {plan.memory.peak / 1e9:6.1f} {plan.seconds * 1e3:8.0f} "
            f"{plan.tokens_per_second:13.0f}"
        )
    print(f"fastest: {overrides(found[0])}")
    print(f"  holds {found[0].memory}")
    return 0


def _config(args: argparse.Namespace, count: int) -> RunConfig:
    keys, path = args.overrides, args.config
    if path is None:
        path = ROOT / "conf" / "teal_tp1.yaml"
        precision = ["precision.fp8=delayed", "precision.main_grads=bf16", "precision.moments=bf16"]
        keys = [*precision, f"training.global_batch_size={4 * count}", *keys]
    if args.model:
        keys = [f"model.preset={args.model}", *keys]
    config = load_config(path, keys)
    if args.tokens:
        config.data.height, config.data.width = clip_of_tokens(args.tokens)
    return config


if __name__ == "__main__":
    run_command(main)
