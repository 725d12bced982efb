"""How fast, and in how little memory, are checkpoints converted, compared with ``cp`` and reading the same bytes?

    python benchmarks/convert.py [--preset 4b] [--folder /tmp/convert] [--keep]

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
    parser.add_argument("--keep", action="store_true", help="leave the model there, for the next time")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.pt"
    if not model.exists():
        write_random_model(model, arguments.preset)
    size = model.stat().st_size
    copy, shards, merged, hub = (folder / name for name in ("copy.pt", "model.pt", "merged.pt", "hub"))

    copies, syncs, reads = [], [], []
    for _ in range(2):  # the faster of two, so that a slow moment of the disk does not flatter us
        evict(model)
        copies.append(measure(["cp", str(model), str(copy)])[0])
        syncs.append(measure(["sync", str(copy)])[0])
        copy.unlink()
        evict(model)
        reads.append(read(model))
    copy_seconds, sync_seconds, read_seconds = min(copies), min(syncs), min(reads)
    base = copy_seconds + read_seconds
    machine = f"{os.cpu_count()} CPUs, {platform.machine()}, torch {torch.__version__}"
    print(f"{arguments.preset}: {size / 1e9:.2f} GB; {machine}")
    print(
        f"cp {copy_seconds:.1f} s + reading {read_seconds:.1f} s = {base:.1f} s (fsync of the copy {sync_seconds:.1f})"
    )

    python = [sys.executable, "scripts/"]
    commands = {
        "shard, TP=4": (["shard_autoregressive_base_checkpoints.py", "-c", model, "-t", 4], "model_model_mp_*.pt"),
        "merge": (["merge_autoregressive_tp_checkpoints.py", "-c", shards, "-o", merged, "-t", 4], merged.name),
        "safetensors": (["convert_checkpoint.py", "--input", model, "--output", hub, "--to", "safetensors"], hub.name),
    }
    results = {"bytes": size, "cp_seconds": copy_seconds, "read_seconds": read_seconds, "sync_seconds": sync_seconds}
    print(f"{'':14} {'seconds':>8} {'of cp + read':>13} {'peak GiB':>9}")
    for name, ((script, *rest), output) in commands.items():
        times, peaks = [], []
        for _ in range(2):  # the faster of two here as well
            for old in folder.glob(output):
                remove(old)
            evict(*folder.glob("*.pt"))
            seconds, peak = measure([python[0], python[1] + script, *map(str, rest)])
            times.append(seconds)
            peaks.append(peak)
        print(f"{name:14} {min(times):8.1f} {min(times) / base:12.2f}x {max(peaks):9.2f}", flush=True)
        results[name] = {"seconds": times, "ratio": min(times) / base, "peak_gib": max(peaks)}
        if name == "merge":
            files = sorted(folder.glob("model_model_mp_*.pt"))
            print(f"{'':14} a shard holds {max(path.stat().st_size for path in files) / size:.3f} of the model")
            for path in (merged, *files):
                path.unlink()
    remove(hub)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
