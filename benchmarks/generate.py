"""How fast does the KV cache generate on this GPU? One JSON line per case.

    python benchmarks/generate.py [--preset 4b] [--cases 1 1:fp8 8] [--prompt 5120 --new 7680] [--kernels]
    torchrun --nproc-per-node 2 benchmarks/generate.py

Weights are random. ``share_of_bandwidth`` is what a token must read (weights of layers and head, and the filled cache)
over the peak of the GPU's memory. ``--kernels`` adds the time of each kernel in one step in the middle of the clip.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from train_step import environment

from cosmos_mcore.checkpoint.names import original_shapes
from cosmos_mcore.config import RunConfig, derive_video_layout
from cosmos_mcore.inference import triton_ops
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.offload import tensors_of
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.weights import quantize, weights_from
from cosmos_mcore.model.init import initial_tensor
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.parallel.launch import is_rank_zero, world_size

PEAK_TB_PER_S = {"H200": 4.8, "H100": 3.35, "A100": 2.04}


def build(preset: str, size: tuple[int, int, int]) -> CachedNetwork:
    """A network of random bfloat16 weights, for clips of (frames, height, width)."""
    config, arch = RunConfig(), PRESETS[preset]
    config.data.num_frames, config.data.height, config.data.width = size
    config.parallel.tensor_model_parallel_size = world_size()
    device = initialize(config.parallel, 0)
    group = parallel_state.get_tensor_model_parallel_group()
    shapes = original_shapes(arch)
    weights = weights_from(
        lambda name: initial_tensor(name, shapes[name], arch, 0, device),
        arch,
        device,
        torch.bfloat16,
        rank=group.rank(),
        size=group.size(),
    )
    return CachedNetwork(weights, arch, derive_video_layout(config), group)


def in_fp8(network: CachedNetwork) -> CachedNetwork:
    """The same network with the layers' weights in 8 bits."""
    layers = tuple(
        replace(layer, **{name: quantize(getattr(layer, name).data) for name in ("qkv", "proj", "fc1", "fc2")})
        for layer in network.weights.layers
    )
    return CachedNetwork(replace(network.weights, layers=layers), network.arch, network.layout, network.group)


def bytes_per_step(network: CachedNetwork, batch: int, filled: float) -> float:
    """What one step of one rank must read, with caches filled to so many positions."""
    weights = sum(t.nbytes for t in tensors_of(network.weights)) - network.weights.embedding.nbytes
    per_position = 2 * len(network.weights.layers) * network.groups * network.arch.kv_channels * network.dtype.itemsize
    return weights + batch * filled * per_position


def kernel_times(generator: TokenGenerator) -> dict[str, float]:
    """Microseconds that each kernel adds to one step: from the end of the one before, as many start up before that."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        generator.advance()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    times: Counter[str] = Counter()
    last_end = 0.0
    for event in sorted(events, key=lambda event: event.time_range.end):
        start, end = max(event.time_range.start, last_end), event.time_range.end
        times[event.name[:60]] += end - start
        times["between"] += start - last_end if last_end else 0.0
        last_end = end
    return {name: round(micro, 1) for name, micro in times.most_common(12)}


def measure(
    network: CachedNetwork, batch: int, prompt: int, new: int, kernels: bool, idle_bytes: int = 0
) -> dict[str, Any]:
    """Generates once to warm up and once for the figures; ``idle_bytes`` of memory are not this network's."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    generator = TokenGenerator(network, batch, SamplingOptions(1.0, 0.8))
    torch.cuda.synchronize()
    captured = time.perf_counter() - start
    ids = torch.randint(0, network.arch.vocab_size, (batch, prompt), device=network.device)
    dist.broadcast(ids, 0)
    seeds = list(range(batch))
    generator(ids, 32, seeds)
    seconds = []
    for tokens in (1, new):
        torch.cuda.synchronize()
        start = time.perf_counter()
        made = generator(ids, tokens, seeds)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    prefill, whole = seconds
    step = (whole - prefill) / (new - 1)
    times = {}
    if kernels:  # the cache is filled to the end; the step overwrites a position in its middle
        generator._position.fill_(prompt + new // 2)
        generator.advance()
        times = {"kernel_microseconds": kernel_times(generator)}
    again = generator(ids, min(new, 64), seeds)
    peak = next((peak for name, peak in PEAK_TB_PER_S.items() if name in torch.cuda.get_device_name()), None)
    read = bytes_per_step(network, batch, prompt + new / 2)
    return {
        "tokens_per_second": round(batch / step, 1),
        "tokens_per_second_with_prefill": round(batch * new / whole, 1),
        "ms_per_step": round(step * 1e3, 4),
        "share_of_bandwidth": peak and round(read / step / peak / 1e12, 3),
        "gb_read_per_step": round(read / 1e9, 3),
        "prefill_ms": round(prefill * 1e3, 1),
        "capture_s": round(captured, 1),
        "peak_memory_gb": round((torch.cuda.max_memory_allocated() - idle_bytes) / 1e9, 2),
        "repeatable": torch.equal(made[:, : again.size(1)], again),
        "distinct_tokens": made[:, prompt:].unique().numel(),
        **times,
    }


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, arch in PRESETS.items() if not arch.text_to_video]
    parser.add_argument("--preset", default="4b", choices=presets)
    parser.add_argument("--cases", nargs="+", default=["1"], help="sequences at a time, :fp8 behind for 8-bit weights")
    parser.add_argument("--prompt", type=int, default=5120)
    parser.add_argument("--new", type=int, default=7680)
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--no-overlap", action="store_true", help="without programmatic dependent launch")
    args = parser.parse_args()
    if args.no_overlap:
        triton_ops.OVERLAP = False
    network = build(args.preset, (33, 640, 1024))
    for case in args.cases:
        batch, _, precision = case.partition(":")
        tested, idle_bytes = network, 0
        if precision == "fp8":  # the layers in bfloat16 stay for the cases that follow
            tested, idle_bytes = in_fp8(network), sum(tensor.nbytes for tensor in tensors_of(network.weights.layers))
        result = measure(tested, int(batch), args.prompt, args.new, args.kernels, idle_bytes)
        line = {
            "case": case,
            "preset": args.preset,
            "prompt": args.prompt,
            "new": args.new,
            "overlap": not args.no_overlap,
            "processes": world_size(),
            **result,
        }
        if is_rank_zero():
            print(json.dumps({**line, **environment()}), flush=True)
    shut_down()


if __name__ == "__main__":
    main()
