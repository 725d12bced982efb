"""How fast, and in how little memory, are checkpoints converted, compared with ``cp`` and reading the same bytes?

    python benchmarks/convert.py [--preset 4b] [--folder /tmp/convert] [--rounds 3] [--keep]

Writes a model of random bf16 with the real shapes (8 GB for 4b; three times that on disk for a while), then runs each
conversion in a process of its own. A conversion also checks every checksum, computes new ones and waits for the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from cosmos_mcore.checkpoint.files import remove
from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.checkpoint.torch_file import TensorSpec, TorchFileWriter
from cosmos_mcore.model.presets import PRESETS

ROOT = Path(__file__).parents[1]
SLICE = 2**24  # numbers drawn at a time


def write_random_model(path: Path, preset: str) -> None:
    """Writes ``model.pt`` of random bf16, tensor by tensor."""
    shapes = original_shapes(PRESETS[preset])
    generator = torch.Generator().manual_seed(0)
    with TorchFileWriter(path, {"model." + n: TensorSpec(s, torch.bfloat16) for n, s in shapes.items()}) as writer:
        for shape in shapes.values():
            tensor = torch.empty(shape, dtype=torch.bfloat16)
            for part in tensor.view(-1).split(SLICE):
                part.copy_(torch.randn(part.shape, generator=generator))
            writer.write(tensor)


def measure(command: list[str]) -> tuple[float, float]:
    """Runs a command; returns wall seconds and its peak resident memory in GiB."""
    start = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def evict(*paths: Path) -> None:
    """Writes files out and drops them from the page cache, so that every measurement starts with cold input."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read(path: Path) -> float:
    """Seconds to read a file once."""
    buffer = bytearray(2**24)
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def main() -> None:
    """Runs all measurements and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="4b", choices=list(PRESETS))
    parser.add_argument("--folder", type=Path, default=Path("/tmp/cosmos_convert_benchmark"))
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--keep", action="store_true", help="leave the model there, for the next time")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.pt"
    if not model.exists():
        write_random_model(model, arguments.preset)
    size = model.stat().st_size
    copy, shards, merged, hub = (folder / name for name in ("copy.pt", "model.pt", "merged.pt", "hub"))

    scripts = {
        "shard, TP=4": (["shard_autoregressive_base_checkpoints.py", "-c", model, "-t", 4], "model_model_mp_*.pt"),
        "merge": (["merge_autoregressive_tp_checkpoints.py", "-c", shards, "-o", merged, "-t", 4], merged.name),
        "safetensors": (["convert_checkpoint.py", "--input", model, "--output", hub, "--to", "safetensors"], hub.name),
    }
    rounds: list[dict[str, float]] = []
    peaks = dict.fromkeys(scripts, 0.0)
    for _ in range(arguments.rounds):  # all in turn, so that a slow minute of the disk falls on all alike
        evict(model)
        times = {"cp": measure(["cp", str(model), str(copy)])[0]}
        times["fsync of the copy"] = measure(["sync", str(copy)])[0]
        copy.unlink()
        evict(model)
        times["reading"] = read(model)
        for name, ((script, *rest), output) in scripts.items():
            for old in folder.glob(output):
                remove(old)
            evict(*folder.glob("*.pt"))
            times[name], peak = measure([sys.executable, f"scripts/{script}", *map(str, rest)])
            peaks[name] = max(peaks[name], peak)
            if name == "merge":
                files = sorted(folder.glob("model_model_mp_*.pt"))
                share = max(path.stat().st_size for path in files) / size
                for path in (merged, *files):
                    path.unlink()
        remove(hub)
        rounds.append(times)
        print("  ".join(f"{name} {seconds:.1f}" for name, seconds in times.items()), flush=True)

    best = {name: min(times[name] for times in rounds) for name in rounds[0]}
    base = best["cp"] + best["reading"]
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}"
    print(f"{arguments.preset}: {size / 1e9:.2f} GB; {machine}; the fastest of {len(rounds)} rounds:")
    print(f"cp {best['cp']:.1f} s + reading {best['reading']:.1f} s = {base:.1f} s")
    print(f"{'':14} {'seconds':>8} {'of cp + read':>13} {'peak GiB':>9}")
    for name in scripts:
        print(f"{name:14} {best[name]:8.1f} {best[name] / base:12.2f}x {peaks[name]:9.2f}")
    print(f"a shard of TP=4 holds {share:.3f} of the model")
    (folder / "results.json").write_text(
        json.dumps({"bytes": size, "rounds": rounds, "peak_gib": peaks}, indent=2) + "\n"
    )
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
