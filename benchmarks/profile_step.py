"""Profiles optimizer steps of any config: a Chrome trace, the costliest kernels, and one JSON line of sums.

    python benchmarks/profile_step.py conf/teal_tp1.yaml precision.fp8=delayed --trace step.json

Ids and weights are random, as in ``train_step.py``. Open the trace in https://ui.perfetto.dev. Communication counts as
exposed while no other kernel runs; waiting for other ranks is part of it. All figures are those of the first rank.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from train_step import ROOT, check, environment, prepare, release

from cosmos_mcore.config import RunConfig, load_config
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.parallel.launch import is_rank_zero, processes_to_start, run_processes


class Profile(NamedTuple):
    """What one step costs.

    Attributes:
        kernels: (kernel, milliseconds, calls) of every kernel (on a CPU: operator), costliest first.
        communication_ms: of NCCL's kernels together.
        exposed_ms: while a kernel of NCCL runs, and no other.
    """

    kernels: list[tuple[str, float, int]]
    communication_ms: float
    exposed_ms: float


def profile_steps(config: RunConfig, trace: Path | None, steps: int = 3, warmup: int = 5) -> Profile:
    """Profiles ``steps`` steps after ``warmup`` others.

    Args:
        config: the run's.
        trace: where the Chrome trace goes, on rank 0.
        steps: how many.
        warmup: how many before, unprofiled.
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
        if event.device_type == device and is_kernel(event.key):
            cost = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            totals[event.key][0] += cost / 1e3 / steps
            totals[event.key][1] += event.count / steps
    rows = [(name, ms, round(count)) for name, (ms, count) in totals.items()]
    spans = []
    if on_gpu:
        events = [event for event in profiler.events() if event.device_type == device and is_kernel(event.name)]
        spans = [(event.name, event.time_range.start, event.time_range.end) for event in events]
    together, exposed = communication(spans)
    return Profile(sorted(rows, key=lambda row: -row[1]), together / 1e3 / steps, exposed / 1e3 / steps)


def communication(spans: list[tuple[str, float, float]]) -> tuple[float, float]:
    """Sums over kernels: how long those of NCCL run, and how long one of them runs while no other kernel does.

    Args:
        spans: name, start and end of each kernel, in any unit and order.
    """
    together = sum(end - start for name, start, end in spans if is_communication(name))
    edges = sorted(
        (time, change, is_communication(name))
        for name, start, end in spans
        for time, change in ((start, 1), (end, -1))
        if end > start
    )
    exposed, running, before = 0.0, {True: 0, False: 0}, 0.0
    for time, change, sends in edges:
        if running[True] and not running[False]:
            exposed += time - before
        running[sends] += change
        before = time
    return together, exposed


def is_kernel(name: str) -> bool:
    """Whether it is no mark over kernels, such as ``nccl:all_gather``, which PyTorch puts over those of NCCL."""
    return not name.startswith("nccl:")


def is_communication(name: str) -> bool:
    """Whether a kernel of this name is one of NCCL's."""
    return name.startswith("nccl") and is_kernel(name)


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
    result = profile_steps(config, args.trace)
    if is_rank_zero():
        total = sum(ms for _, ms, _ in result.kernels)
        for name, ms, count in result.kernels[: args.top]:
            print(f"{ms:9.3f} ms {ms / total:6.1%} {count:6d} x  {short(name)}")
        line = {
            "kernels_ms": round(total, 3),
            "kinds": len(result.kernels),
            "communication_ms": round(result.communication_ms, 3),
            "exposed_communication_ms": round(result.exposed_ms, 3),
        }
        print(json.dumps({**line, **environment()}))
    release()
    return 0


if __name__ == "__main__":
    run_command(main)
