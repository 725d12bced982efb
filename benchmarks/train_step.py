"""Measures optimizer steps of any config and prints one JSON line.

    python benchmarks/train_step.py conf/teal_tp1.yaml precision.fp8=delayed training.global_batch_size=2
    torchrun --nproc-per-node 2 benchmarks/train_step.py conf/teal_tp1.yaml parallel.tensor_model_parallel_size=2

Ids are random and the weights too (nothing is loaded), unless ``--real`` asks for the config's clips, tokenizer and
weights. The convention of TFLOP/s is that of ``training/flops.py``; MFU is against 989 TFLOP/s, an H100's bf16 peak.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cosmos_mcore.config import RunConfig, derive_video_layout, load_config
from cosmos_mcore.config.derived import TEXT_LENGTH, data_parallel_size
from cosmos_mcore.data.loader import Batch
from cosmos_mcore.model.cosmos_ar_model import CosmosARModel
from cosmos_mcore.model.presets import check_run_layout, resolve_arch
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.parallel.command_line import run_command
from cosmos_mcore.parallel.launch import is_rank_zero, processes_to_start, run_processes, world_size
from cosmos_mcore.training.flops import flops_per_clip
from cosmos_mcore.training.optimizer import set_learning_rate, update
from cosmos_mcore.training.preflight import preflight, processes
from cosmos_mcore.training.setup import build_trainable, set_up
from cosmos_mcore.training.step import LossPositions, forward_backward

PEAK_TFLOPS = 989.0
ROOT = Path(__file__).parents[1]


class Clock:
    """Marks points in the device's queue, or in host time where there is no GPU."""

    def __init__(self) -> None:
        self.cuda = torch.cuda.is_available()

    def mark(self) -> Any:
        """A point between what was queued and what will be."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks; waits for the second."""
        if not self.cuda:
            return (end - start) * 1e3
        end.synchronize()
        return float(start.elapsed_time(end))


def prepare(config: RunConfig, real: bool) -> Callable[[Callable[[], None]], float]:
    """Builds the run.

    Returns:
        A function that does one step, calls its argument before it, after forward and backward, and after the update,
        and returns the seconds that it waited for its clips.
    """
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    if real:
        run = set_up(config)
        model, optimizer, device, next_batch = run.model, run.optimizer, run.device, run.loader.next
    else:
        device = groups.initialize(config.parallel, config.training.seed)
        chunks, model, optimizer = build_trainable(config, arch, layout, device)
        random_weights(chunks, config.training.seed)
        optimizer.reload_model_params()
        clips = config.training.global_batch_size // data_parallel_size(config, dist.get_world_size())
        ids = torch.randint(arch.vocab_size, (clips, layout.num_tokens), device=device)
        text = None
        if arch.context_size is not None:
            text = torch.randn(clips, TEXT_LENGTH, arch.context_size, dtype=torch.bfloat16, device=device)
        next_batch = lambda: Batch(ids, text)  # noqa: E731
    positions = LossPositions(layout, arch, config.model.z_loss_coeff, device)
    set_learning_rate(optimizer, 1e-5)

    def step(mark: Callable[[], None]) -> float:
        start = time.perf_counter()
        batch = next_batch()
        waited = time.perf_counter() - start
        mark()
        forward_backward(model, positions, batch.ids, config.training.micro_batch_size, batch.context)
        mark()
        update(optimizer)
        mark()
        return waited

    return step


def random_weights(chunks: list[CosmosARModel], seed: int) -> None:
    """Weights drawn on the device, which is quick; they depend on the layout, unlike those of a run."""
    torch.manual_seed(seed)
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.02)
            else:
                torch.nn.init.ones_(parameter)


def measure(config: RunConfig, steps: int = 20, warmup: int = 5, real: bool = False) -> dict[str, Any]:
    """Medians over ``steps`` steps after ``warmup`` others."""
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    step, clock = prepare(config, real), Clock()
    for _ in range(warmup):
        step(lambda: None)
    if clock.cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    dist.barrier()
    marks: list[list[Any]] = []
    waited, queued = [], []
    for _ in range(steps):
        row: list[Any] = []
        start = time.perf_counter()
        waited.append(step(lambda row=row: row.append(clock.mark())) * 1e3)
        queued.append((time.perf_counter() - start) * 1e3)
        marks.append(row)
        if len(marks) > 1:
            clock.milliseconds(marks[-2][0], marks[-2][-1])  # as the trainer waits, one step later
    spans = [[clock.milliseconds(a, b) for a, b in zip(row, row[1:], strict=False)] for row in marks]
    whole = statistics.median(clock.milliseconds(a[-1], b[-1]) for a, b in zip(marks, marks[1:], strict=False))
    clips = config.training.global_batch_size / dist.get_world_size() / whole * 1e3
    tflops = clips * flops_per_clip(arch, layout.sequence_length) / 1e12
    memory = [None, None]
    if clock.cuda:  # of the fullest rank: pipeline stages differ
        peaks = torch.tensor([torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()], device="cuda")
        dist.all_reduce(peaks, dist.ReduceOp.MAX)
        memory = [round(peak / 1e9, 2) for peak in peaks.tolist()]
    return {
        "ms_per_step": round(whole, 2),
        "data_wait_ms": round(statistics.median(waited), 2),
        "forward_backward_ms": round(statistics.median(span[0] for span in spans), 2),
        "optimizer_ms": round(statistics.median(span[1] for span in spans), 2),
        "host_ms": round(statistics.median(queued), 2),
        "tokens_per_second_per_gpu": round(clips * layout.sequence_length),
        "clips_per_second": round(clips * dist.get_world_size(), 3),
        "tflops_per_gpu": round(tflops, 1),
        "mfu": round(tflops / PEAK_TFLOPS, 4),
        "peak_memory_gb": memory[0],
        "reserved_memory_gb": memory[1],
        "sequence_length": layout.sequence_length,
        "padded_sequence_length": layout.padded_sequence_length,
        "processes": dist.get_world_size(),
        "steps": steps,
        **environment(),
    }


def environment() -> dict[str, Any]:
    """What a figure must name: device, versions, commit."""
    versions = {}
    for name in ("torch", "megatron-core", "transformer-engine", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions,
        "commit": commit.stdout.strip() or None,
    }


def release() -> None:
    """Gives back what a measurement held, for the next one in this process."""
    groups.shut_down()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check(config: RunConfig, real: bool) -> None:
    """Checks the config before any process is started.

    Raises:
        ValueError: as a run of it would; files matter only if it reads them.
    """
    if real:
        preflight(config, world_size())
    else:
        check_run_layout(config, resolve_arch(config.model), processes(config, world_size()))


def main(argv: list[str]) -> int:
    """Measures the config of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(ROOT / "conf/tiny_cpu.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--real", action="store_true", help="the config's clips, tokenizer and weights")
    args = parser.parse_intermixed_args(argv)
    if args.steps < 2 or args.warmup < 0:
        raise ValueError(f"--steps={args.steps} must be at least 2, and --warmup={args.warmup} at least 0")
    config = load_config(args.config, args.overrides)
    check(config, args.real)
    if count := processes_to_start(config):
        return run_processes(count, sys.argv)
    result = measure(config, args.steps, args.warmup, args.real)
    if is_rank_zero():
        print(json.dumps({"config": args.config, "overrides": args.overrides, **result}))
    release()
    return 0


if __name__ == "__main__":
    run_command(main)
