"""How does training scale? Speed, memory and exposed communication of layouts, beside one GPU and scripts/plan.py.

    python benchmarks/scaling.py OUTPUT.json --layouts 4b:dp1 4b:dp8 4b:tp2dp4 12b:tp4pp2 [section.key=value ...]
    python benchmarks/scaling.py OUTPUT.json    # only prints the table of what the file holds

A layout is a preset and its parallel sizes (dp, tp, pp, cp); it runs on as many GPUs as these multiply to. Clips of
33 x 640 x 1024 (12,800 tokens), FP8, bf16 gradients and moments, one clip per micro-batch, and ``--clips`` clips per
GPU and step, so that each GPU does the same work. Two runs per layout, of ``train_step.py`` and ``profile_step.py``.
The file keeps what earlier calls wrote, so layouts may be measured one by one. Efficiency is against ``PRESET:dp1``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from train_step import ROOT

from cosmos_mcore.config import load_config
from cosmos_mcore.data.encode import replaced_file
from cosmos_mcore.model.presets import check_run_layout, resolve_arch
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.training.plan import estimate_memory

KEYS = {
    "tp": "parallel.tensor_model_parallel_size",
    "pp": "parallel.pipeline_model_parallel_size",
    "cp": "parallel.context_parallel_size",
}


def sizes_of(layout: str) -> dict[str, int]:
    """The sizes in the name of a layout.

    Raises:
        ValueError: if it is none.
    """
    _, _, name = layout.partition(":")
    sizes = {kind: int(size) for kind, size in re.findall(r"(dp|tp|pp|cp)([1-9]\d*)", name)}
    if not sizes or "".join(f"{kind}{size}" for kind, size in sizes.items()) != name:
        raise ValueError(f"{layout!r} is no layout: write a preset and sizes, such as 4b:dp8, 4b:tp2dp4, 12b:tp4pp2")
    return sizes


def keys_of(layout: str, clips: int) -> list[str]:
    """What a config of this layout says, with so many clips per GPU and step."""
    sizes = sizes_of(layout)
    return [
        f"model.preset={layout.partition(':')[0]}",
        "data.height=640",
        "data.width=1024",
        *["precision.fp8=delayed", "precision.main_grads=bf16", "precision.moments=bf16"],
        *[f"{key}={sizes[kind]}" for kind, key in KEYS.items() if kind in sizes],
        f"parallel.sequence_parallel={'true' if sizes.get('tp', 1) > 1 else 'false'}",
        f"training.global_batch_size={clips * math.prod(sizes.values())}",
    ]


def last_line(script: str, config: str, keys: list[str], gpus: int, *options: str) -> dict[str, Any]:
    """Runs a benchmark on so many processes.

    Returns:
        The JSON line that it ends with.

    Raises:
        ValueError: if it fails, with what it says.
    """
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)]
    command = [sys.executable, *launch, str(ROOT / "benchmarks" / script), config, *keys, *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        raise ValueError(told[0].removeprefix("error: ") if told else done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(layout: str, config: str, keys: list[str], steps: int) -> dict[str, Any]:
    """Both benchmarks of one layout, and what scripts/plan.py says of its memory."""
    gpus = math.prod(sizes_of(layout).values())
    loaded = load_config(config, keys)
    check_run_layout(loaded, resolve_arch(loaded.model), gpus)
    planned = estimate_memory(loaded, gpus).peak / 1e9
    result = last_line("train_step.py", config, keys, gpus, "--steps", str(steps))
    profile = last_line("profile_step.py", config, keys, gpus)
    sent = {name: profile[name] for name in ("kernels_ms", "communication_ms", "exposed_communication_ms")}
    return {**result, **sent, "planned_memory_gb": round(planned, 2)}


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| layout | GPUs | ms per step | tokens/s/GPU | of one GPU | communication, exposed | peak memory | planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for layout, result in results.items():
        if "error" in result:
            lines.append(f"| {layout} | | {result['error'].splitlines()[-1]} | | | | | |")
            continue
        one = results.get(layout.partition(":")[0] + ":dp1", {}).get("tokens_per_second_per_gpu")
        speed, measured = result["tokens_per_second_per_gpu"], result["peak_memory_gb"]
        share = f"{speed / one:.1%}" if one else ""
        sent = f"{result['communication_ms']:.0f}, {result['exposed_communication_ms']:.0f} ms"
        memory = "" if measured is None else f"{measured:.1f} GB"
        planned = f"{result['planned_memory_gb']:.1f} GB"
        if measured is not None:
            planned += f" ({result['planned_memory_gb'] / measured - 1:+.0%})"
        cells = [
            layout,
            result["processes"],
            f"{result['ms_per_step']:.0f}",
            f"{speed:,}",
            share,
            sent,
            memory,
            planned,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measures the layouts of the command line, and prints the table of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--layouts", nargs="+", default=[], metavar="PRESET:SIZES")
    parser.add_argument("--config", default=str(ROOT / "conf/teal_tp1.yaml"))
    parser.add_argument("--clips", type=int, default=4, help="per GPU and step")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args(argv)
    todo = {layout: [*keys_of(layout, args.clips), *args.overrides] for layout in args.layouts}
    if not todo and not args.output.exists():
        raise ValueError(f"there is no file {args.output} yet; name what to measure with --layouts")
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for layout, keys in todo.items():
        try:
            results[layout] = measure(layout, args.config, keys, args.steps)
        except ValueError as error:  # it does not fit, most likely; the others go on
            results[layout] = {"error": str(error)}
        with replaced_file(args.output) as file:
            file.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 1 if any("error" in results[layout] for layout in todo) else 0


if __name__ == "__main__":
    run_command(main)
