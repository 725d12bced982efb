"""Profiles optimizer steps of any config: a Chrome trace, and the costliest kernels on standard output.

    python benchmarks/profile_step.py conf/teal_tp1.yaml precision.fp8=delayed --trace step.json

Ids and weights are random, as in ``train_step.py``. Open the trace in https://ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import ROOT, check, prepare, release

from cosmos_mcore.config import RunConfig, load_config
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.parallel.launch import is_rank_zero, processes_to_start, run_processes


def profile_steps(
    config: RunConfig, trace: Path | None, steps: int = 3, warmup: int = 5
) -> list[tuple[str, float, int]]:
    """Profiles ``steps`` steps after ``warmup`` others.

    Args:
        config: the run's.
        trace: where the Chrome trace goes, on rank 0.
        steps: how many.
        warmup: how many before, unprofiled.

    Returns:
        (kernel, milliseconds per step, calls per step) of every kernel (on a CPU: operator), costliest first.
    """
    step = prepare(config, real=False)
    for _ in range(warmup):
        step(lambda: None)
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        for _ in range(steps):
            step(lambda: None)
        if on_gpu:
            torch.cuda.synchronize()
    if trace is not None and is_rank_zero():
        profiler.export_chrome_trace(str(trace))
    totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    device = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    for event in profiler.key_averages():
        if event.device_type == device:
            cost = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            totals[event.key][0] += cost / 1e3 / steps
            totals[event.key][1] += event.count / steps
    rows = [(name, ms, round(count)) for name, (ms, count) in totals.items()]
    return sorted(rows, key=lambda row: -row[1])


def short(name: str, width: int = 90) -> str:
    """A kernel's name without its template arguments' noise."""
    name = re.sub(r"^void ", "", name)
    return name if len(name) <= width else name[: width - 3] + "..."


def main(argv: list[str]) -> int:
    """Profiles the config of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "conf/tiny_cpu.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--trace", type=Path, help="file for the Chrome trace")
    parser.add_argument("--top", type=int, default=10, help="kernels to print")
    args = parser.parse_intermixed_args(argv)
    if args.trace is not None and not args.trace.parent.is_dir():
        raise ValueError(f"--trace={args.trace}: there is no folder {args.trace.parent}; make it first")
    config = load_config(args.config, args.overrides)
    check(config, real=False)
    if count := processes_to_start(config):
        return run_processes(count, sys.argv)
    rows = profile_steps(config, args.trace)
    if is_rank_zero():
        total = sum(ms for _, ms, _ in rows)
        for name, ms, count in rows[: args.top]:
            print(f"{ms:9.3f} ms {ms / total:6.1%} {count:6d} x  {short(name)}")
        print(f"{total:9.3f} ms of kernels per step, {len(rows)} kinds")
    release()
    return 0


if __name__ == "__main__":
    run_command(main)
