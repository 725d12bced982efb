"""Does FP8 learn as bf16 does? The loss of each recipe over the same real clips from the same weights.

    python benchmarks/fp8_loss.py --videos folder --output fp8_loss.json [--plot docs/images/fp8_loss.png]
    python benchmarks/fp8_loss.py --output fp8_loss.json --plot docs/images/fp8_loss.png   # only draws

The weights are those of a bf16 run of ``--start_steps`` steps from random ones: the first steps from random weights go
down so steeply that a shift of one step is several percent. Clips are tokenized once, before the first run. The curves
are smoothed over 20 steps before they are compared. The second bf16 run shows what attention's order of additions alone
makes of the same start.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_step import ROOT, check, environment, random_weights, release

from cosmos_mcore.config import RunConfig, derive_video_layout, load_config
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.tokenizer.build import build_tokenizer
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.schedule import learning_rate
from cosmos_mcore.training.setup import build_trainable
from cosmos_mcore.training.step import LossPositions, train_step

RECIPES = {"bf16": None, "tensorwise": "tensorwise", "delayed": "delayed", "blockwise": "blockwise", "bf16 again": None}
SMOOTHING = 20


def read_clips(config: RunConfig, steps: int) -> list[Tensor]:
    """Ids of each step's clips, on the CPU, as a run of this config would see them."""
    device = groups.initialize(config.parallel, config.training.seed)
    index = index_clips(config.data)
    with ClipLoader(
        index,
        ClipSampler(len(index.clips), config.training.seed),
        build_tokenizer(config, device),
        config,
        derive_video_layout(config),
        data_parallel_rank=0,
        data_parallel_size=1,
        replica_group=None,
        device=device,
    ) as loader:
        batches = [loader.next().ids.cpu() for _ in range(steps)]
    release()
    return batches


def train(config: RunConfig, batches: list[Tensor], weights: list[Tensor] | None) -> tuple[list[float], list[Tensor]]:
    """Trains on every batch once.

    Args:
        config: the run's.
        batches: ids of each step.
        weights: to start from; None: random ones.

    Returns:
        Cross entropy of every step, and the weights after the last, on the CPU.
    """
    arch, layout = resolve_arch(config.model), derive_video_layout(config)
    device = groups.initialize(config.parallel, config.training.seed)
    chunks, model, optimizer = build_trainable(config, arch, layout, device)
    if weights is None:
        random_weights(chunks, config.training.seed)
    else:
        with torch.no_grad():
            for parameter, value in zip(chunks[0].parameters(), weights, strict=True):
                parameter.copy_(value)
    optimizer.reload_model_params()
    positions = LossPositions(layout, arch, config.model.z_loss_coeff, device)
    pending = []
    for step, batch in enumerate(batches):
        set_learning_rate(optimizer, learning_rate(config, step))
        pending.append(train_step(model, optimizer, positions, batch.to(device), config.training.micro_batch_size))
    losses = [result.read().loss for result in pending]
    final = [parameter.detach().cpu() for parameter in chunks[0].parameters()]
    del chunks, model, optimizer, positions, pending
    release()
    return losses, final


def smooth(losses: list[float]) -> Tensor:
    """Mean over windows of ``SMOOTHING`` steps."""
    return torch.tensor(losses, dtype=torch.float64).unfold(0, SMOOTHING, 1).mean(-1)


def differences(curves: dict[str, list[float]]) -> dict[str, float]:
    """Largest relative difference of each smoothed curve from that of bf16."""
    base = smooth(curves["bf16"])
    return {name: float(((smooth(c) - base) / base).abs().max()) for name, c in curves.items() if name != "bf16"}


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the smoothed curves, and their difference from bf16 in percent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6.5), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    base = smooth(result["curves"]["bf16"])
    steps = range(SMOOTHING, SMOOTHING + len(base))
    for name, losses in result["curves"].items():
        smoothed = smooth(losses)
        label = name if name.startswith("bf16") else f"FP8 {name}"
        top.plot(steps, smoothed, label=label, linewidth=1.6)
        if name != "bf16":
            bottom.plot(steps, 100 * (smoothed - base) / base, label=label, color=top.lines[-1].get_color())
    for limit in (-0.5, 0.5):
        bottom.axhline(limit, color="0.4", linewidth=0.8, linestyle="--", label="0.5 %" if limit > 0 else None)
    bottom.axhline(0, color="0.6", linewidth=0.8)
    top.set(ylabel="cross entropy, mean of 20 steps", title=result["title"])
    bottom.set(ylabel="difference from bf16 (%)", xlabel="step")
    for axes in (top, bottom):
        axes.legend(frameon=False, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> int:
    """Runs the recipes, or only draws what an earlier run has written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", help="folder with MP4 files; without it nothing runs and --output is read")
    parser.add_argument("--config", default=str(ROOT / "conf/teal_tp1.yaml"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--start_steps", type=int, default=300)
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the curves")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    if args.steps < SMOOTHING or args.start_steps < 1:
        raise ValueError(f"--steps must be at least {SMOOTHING}, over which the curves are smoothed, --start_steps 1")
    if args.videos:
        keys = [
            f"data.path={args.videos}", "tokenizer.name=haar", "tokenizer.path=null", "precision.main_grads=bf16",
            "precision.moments=bf16", *args.overrides,
        ]  # fmt: skip
        check(load_config(args.config, keys), real=False)
        batches = read_clips(load_config(args.config, keys), args.start_steps + args.steps)
        begin = load_config(args.config, [*keys, "optimizer.lr=1e-4", "schedule.warmup_iters=50"])
        before, weights = train(begin, batches[: args.start_steps], None)
        print("start", before[-1], flush=True)
        curves: dict[str, list[float]] = {}
        for name in args.recipes:
            config = load_config(args.config, [*keys, f"precision.fp8={RECIPES[name] or 'null'}"])
            curves[name], _ = train(config, batches[args.start_steps :], weights)
            data = config.data
            title = f"{config.model.preset}, {data.num_frames}x{data.height}x{data.width}, real clips"
            result = {"title": title, "overrides": keys[1:], "before": before, **environment(), "curves": curves}
            if "bf16" in curves:
                result["largest_difference"] = differences(curves)
            args.output.write_text(json.dumps(result))
            print(name, result.get("largest_difference"), curves[name][-1], flush=True)
    if args.plot:
        plot(json.loads(args.output.read_text()), args.plot)
    return 0


if __name__ == "__main__":
    run_command(main)
