"""CPU mode: runs Megatron-Core, which names CUDA devices in many places, on CPUs and gloo.

Switched on by ``initialize`` only where CUDA is absent; nothing else in the package asks which device it is on. It has
two parts, because Megatron-Core reaches for CUDA in two ways and no setting of its own avoids either:

* functions of ``torch.cuda`` that are called for a value or a side effect (``current_device``, streams, events, the
  random state) get their meaning on a CPU;
* literal devices (``device="cuda"``, ``.cuda()``, the type string ``torch.cuda.FloatTensor``) are rewritten by a
  ``TorchFunctionMode``, PyTorch's public way to see every call. PyTorch switches it off within a backward pass.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
_mode: CudaAsCpu | None = None


def _names_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    # A bare integer is a CUDA ordinal; bool is an int too, but never a device.
    return (isinstance(device, str) and device.startswith("cuda")) or type(device) is int


class CudaAsCpu(TorchFunctionMode):
    """Rewrites CUDA devices in the arguments of torch functions to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch in place of ``func``."""
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)  # Megatron's optimizers compare this string
        if _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


class _InOrder(contextlib.nullcontext):
    """Stands for a CUDA stream or event: on a CPU everything is in order already."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)

    def _same(self, *args: Any, **kwargs: Any) -> _InOrder:
        return self

    wait_stream = wait_event = synchronize = record = wait = record_event = _same

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0


def enable() -> None:
    """Switches CPU mode on for the rest of the process; says so in the log. Does nothing a second time."""
    global _mode
    if _mode is not None:
        return
    assert not torch.cuda.is_available(), "CPU mode is only for machines without CUDA"
    import megatron.core.tensor_parallel.random as megatron_random

    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    for name in ("set_device", "synchronize", "empty_cache"):  # torch.compile takes no function under two names
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.current_stream = cuda.default_stream = _InOrder
    cuda.Stream = cuda.Event = _InOrder
    cuda.stream = lambda stream=None: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = (torch.default_generator,)
    # These two hold references to torch.cuda's internals that the lines above do not reach.
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    _mode = CudaAsCpu()
    _mode.__enter__()
    logger.info("no CUDA device: running in CPU mode (gloo, torch attention); fine for tests, slow for large models")
