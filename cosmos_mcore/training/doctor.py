"""What this machine has, what that means for a run, and how to mend what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from cosmos_mcore.config import RunConfig, run_dir
from cosmos_mcore.config.schema import DataConfig
from cosmos_mcore.data.decode import build_decoder
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.synthetic import make_shape_clips
from cosmos_mcore.model.builder import check_fp8
from cosmos_mcore.parallel import cpu_mode
from cosmos_mcore.parallel.launch import world_size
from cosmos_mcore.training.preflight import preflight, processes

OK, LIMITS, FAILS = "OK", "limits", "fails"
_GPU_EXTRA = "pip install --no-build-isolation -e '.[gpu]' -c constraints.txt"
_FP8_CAPABILITY = (8, 9)
_LEAST_SHARED_GB = 1.0  # NCCL and PyTorch's workers keep queues in /dev/shm


@dataclass
class Finding:
    """One line of the report.

    Attributes:
        name: what was looked at.
        status: ``OK``; ``LIMITS``: runs, with less; ``FAILS``: a run, or the chosen config, cannot start.
        found: version or number.
        mend: what to do about it.
    """

    name: str
    status: str
    found: str
    mend: str = ""

    def __str__(self) -> str:
        """The line."""
        return f"{self.name:22} {self.status:7} {self.found}" + (f" -> {self.mend}" if self.mend else "")


def examine(config: RunConfig | None = None) -> list[Finding]:
    """Looks at everything; takes some seconds, and a GPU's memory for a tiny model.

    Args:
        config: also says whether this run could start here.
    """
    return [finding for look in (_packages, _gpus, _memory, _trials) for finding in look()] + (
        [] if config is None else list(_of_config(config))
    )


def _packages() -> Iterator[Finding]:
    yield Finding("Python", OK, sys.version.split()[0])
    yield Finding("torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    yield Finding("Megatron-Core", OK, importlib.metadata.version("megatron-core"))
    on_gpu = torch.cuda.is_available()
    te = _version("transformer_engine", "transformer-engine")
    yield _optional("Transformer Engine", te, on_gpu, "no training on the GPU", _GPU_EXTRA)
    dali = _version("nvidia.dali", "nvidia-dali-cuda130", "nvidia-dali-cuda120")
    yield _optional("DALI", dali, on_gpu, "clips are decoded on the CPU", _GPU_EXTRA)
    apex = _version("amp_C")
    yield Finding("Apex", OK, apex or "not installed, not needed")
    if on_gpu:
        yield Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))


def _version(module: str, *distributions: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception:  # a package that is there but broken is none
        return None
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "present"


def _optional(name: str, version: str | None, wanted: bool, without: str, mend: str) -> Finding:
    if version is not None:
        return Finding(name, OK, version)
    return Finding(name, LIMITS if wanted else OK, f"not installed: {without}", mend if wanted else "")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", LIMITS, "none: CPU mode, for tests and the demo", "run on a machine with NVIDIA GPUs")
        return
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    yield Finding("driver", OK, driver or "unknown")
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = f"{torch.cuda.get_device_name(number)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        busy = free < 0.9 * total
        yield Finding(f"GPU {number}", LIMITS if busy else OK, name, "end what else uses it" if busy else "")
    fp8 = torch.cuda.get_device_capability() >= _FP8_CAPABILITY
    yield Finding("FP8", OK if fp8 else LIMITS, "possible" if fp8 else "not on this GPU: keep precision.fp8=null")
    with contextlib.suppress(OSError):
        ctypes.CDLL("libnvcuvid.so.1")
        yield Finding("NVDEC", OK, "present")
        return
    mend = "in a container set NVIDIA_DRIVER_CAPABILITIES=all; else data.decoder=pyav"
    yield Finding("NVDEC", LIMITS, "libnvcuvid.so.1 is not there: no decoding on the GPU", mend)


def _memory() -> Iterator[Finding]:
    if torch.cuda.device_count() > 1:
        links = _output("nvidia-smi", "nvlink", "--status").count("GB/s")
        mend = "" if links else "tensor parallelism will be slow; prefer pipeline or data parallelism"
        yield Finding("NVLink", OK if links else LIMITS, f"{links} links", mend)
    memory = psutil.virtual_memory()
    yield Finding("memory", OK, f"{memory.available / 1e9:.0f} of {memory.total / 1e9:.0f} GB free")
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    unlimited = locked == resource.RLIM_INFINITY
    if torch.cuda.is_available():
        mend = "" if unlimited else "ulimit -l unlimited (docker: --ulimit memlock=-1)"
        found = "unlimited" if unlimited else f"{locked / 1e6:.0f} MB: saves may block for longer"
        yield Finding("locked memory", OK if unlimited else LIMITS, found, mend)
    folder = Path(os.environ.get("OUTPUT_ROOT", "."))
    disk = shutil.disk_usage(folder if folder.exists() else Path("."))
    yield Finding("disk", OK, f"{disk.free / 1e9:.0f} GB free for {folder}; a 4B checkpoint takes 56")
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total / 1e9
        enough = shared >= _LEAST_SHARED_GB
        mend = "" if enough else "docker run --ipc=host, or --shm-size=8g"
        yield Finding("shared memory", OK if enough else LIMITS, f"{shared:.1f} GB", mend)


def _trials() -> Iterator[Finding]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else cpu_mode.CPU
    size = 256

    def product() -> str:
        matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16)
        assert (matrix @ matrix)[0, 0].item() == size
        return f"bf16 on {device}"

    def fp8_product() -> str:
        import transformer_engine.pytorch as te

        layer = te.Linear(size, size, params_dtype=torch.bfloat16, device=device)
        with te.fp8_autocast(enabled=True):
            result = layer(torch.ones(size, size, device=device, dtype=torch.bfloat16))
        assert torch.isfinite(result).all()
        return "Transformer Engine's linear layer"

    def clip() -> str:
        with tempfile.TemporaryDirectory() as folder:
            make_shape_clips(Path(folder), num_clips=1, num_frames=17, height=64, width=128)
            data = DataConfig(path=folder, height=64, width=128, num_frames=17)
            decoder = build_decoder(data, device)
            frames = decoder.decode(index_clips(data).clips[0])
            decoder.close()
        return f"{len(frames)} frames with {type(decoder).__name__}"

    def all_reduce() -> str:
        count = torch.cuda.device_count()
        tensors = [torch.ones(1, device=torch.device("cuda", number)) for number in range(count)]
        torch.cuda.nccl.all_reduce(tensors)
        assert all(tensor.item() == count for tensor in tensors)
        return f"{count} GPUs"

    yield _trial("matrix product", product, "install the torch that fits the driver: https://pytorch.org")
    if device.type == "cuda":
        if torch.cuda.get_device_capability() >= _FP8_CAPABILITY and _version("transformer_engine"):
            yield _trial("FP8 product", fp8_product, _GPU_EXTRA)
        yield _trial("all-reduce", all_reduce, "see NCCL_DEBUG=INFO; docker needs --ipc=host")
    yield _trial("decoding a clip", clip, "data.decoder=pyav, or pip install --force-reinstall av")


def _trial(name: str, work: Callable[[], str], mend: str) -> Finding:
    try:
        return Finding(name, OK, work())
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        return Finding(name, FAILS, f"{type(error).__name__}: {first[:200]}", mend)


def _of_config(config: RunConfig) -> Iterator[Finding]:
    """Whether the chosen config could run on this node."""
    try:
        preflight(config, world_size())
    except ValueError as error:
        yield Finding("config", FAILS, str(error))
        return
    yield Finding("config", OK, f"the run's folder is {run_dir(config)}")
    count, gpus = processes(config, world_size()), torch.cuda.device_count()
    if torch.cuda.is_available() and count > gpus:
        yield Finding("GPUs of the layout", FAILS, f"{gpus}, and the layout needs {count}", "use more nodes (torchrun)")
    if torch.cuda.is_available() and not _version("transformer_engine"):
        yield Finding(
            "layers", FAILS, "Transformer Engine is not installed, and training on a GPU needs it", _GPU_EXTRA
        )
    try:
        check_fp8(config.precision.fp8, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ValueError as error:
        yield Finding("precision.fp8", FAILS, str(error))
    if config.data.decoder == "dali" and not torch.cuda.is_available():
        yield Finding("data.decoder=dali", FAILS, "there is no GPU", "data.decoder=auto")
    elif config.data.decoder == "dali" and _version("nvidia.dali") is None:
        yield Finding("data.decoder=dali", FAILS, "DALI is not installed", f"data.decoder=auto, or {_GPU_EXTRA}")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
