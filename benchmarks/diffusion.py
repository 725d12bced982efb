"""How fast is the diffusion decoder? Random weights of the released size, 33 frames at 640x1024, bfloat16.

    python benchmarks/diffusion.py [--fp8] [--offload | --kernels]
    torchrun --nproc-per-node 2 benchmarks/diffusion.py      # the processes share the latent frames

One JSON line: seconds per network call (both guidance branches in one) and its share of the time that an H100 or H200
would take for its matrices and attention at 989 TFLOP/s, or for matrices in FP8 at twice that (1.0: the floor is
reached); seconds for everything from ids to frames, first with compiling and choosing kernels, then without; peak
memory of decoding and memory between decodings. ``--kernels`` adds milliseconds of each kernel in one network call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cosmos_mcore.inference.diffusion.decoder import DiffusionDecoder, reflected
from cosmos_mcore.inference.diffusion.network import (
    LATENT_CHANNELS,
    PATCH,
    DiffusionNetwork,
    DiffusionSize,
    flops_per_call,
)
from cosmos_mcore.tokenizer.cv8x8x8 import CHUNK, ContinuousDecoder
from cosmos_mcore.tokenizer.networks import Decoder, NetworkSize

PEAK_TFLOPS = 989.0
TEXT_ROWS = 512


def random_decoder(size: DiffusionSize, device: torch.device, group: Any, fp8: bool, offload: bool) -> DiffusionDecoder:
    """As loaded from the released files, with small random weights."""
    with torch.device("meta"):
        network = DiffusionNetwork(size, group).to(torch.bfloat16).requires_grad_(False).eval()
    network.to_empty(device=device)
    torch.manual_seed(0)  # the same weights on all ranks
    for parameter in network.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=parameter.size(-1) ** -0.5)
    if fp8:
        network.to_fp8()
    tokenizer = Decoder(NetworkSize(spatial_compression=8, latent_channels=16))
    columns = torch.zeros(16, CHUNK), torch.ones(16, CHUNK)
    text = torch.randn(1, TEXT_ROWS, size.text_channels)
    return DiffusionDecoder(network, ContinuousDecoder(tokenizer, *columns, device), text, device, offload=offload)


class CallTimes:
    """Times every call of the network with events, without waiting for it."""

    def __init__(self, network: DiffusionNetwork) -> None:
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        network.register_forward_pre_hook(lambda *_: self.events.append((self._mark(), self._event())))
        network.register_forward_hook(lambda *_: self.events[-1][1].record())

    def take(self) -> list[float]:
        """Seconds of each call since the last time, which must be over."""
        seconds = [start.elapsed_time(end) / 1000 for start, end in self.events]
        self.events.clear()
        return seconds

    def _mark(self) -> torch.cuda.Event:
        event = self._event()
        event.record()
        return event

    @staticmethod
    def _event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)


def kernel_times(network: DiffusionNetwork, ids: Tensor, text: Tensor) -> dict[str, float]:
    """Milliseconds of each kernel in one call of a network that has all frames; ids [8, h, w]."""
    from torch.profiler import ProfilerActivity, profile

    branches = torch.stack([ids, torch.zeros_like(ids)])
    latent = torch.randn(1, LATENT_CHANNELS, CHUNK, PATCH * ids.size(1), PATCH * ids.size(2), device=ids.device)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        network(latent, branches, text, 0.3)
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in recorded.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:70]] += event.time_range.elapsed_us() / 1000
    return {name: round(milliseconds, 2) for name, milliseconds in times.most_common(14)}


def main() -> None:
    """Decodes twice and prints the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=33, help="1 + a multiple of 8")
    parser.add_argument("--height", type=int, default=640)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--fp8", action="store_true", help="round the large matrices and their inputs to 8 bits")
    parser.add_argument("--offload", action="store_true", help="park the network in CPU memory between decodings")
    parser.add_argument("--kernels", action="store_true", help="also print the time of each kernel; one GPU only")
    args = parser.parse_args()
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.kernels and (args.offload or ranks > 1):
        parser.error("--kernels needs one GPU and no --offload")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if ranks > 1:
        dist.init_process_group("nccl", device_id=device)
    size = DiffusionSize()
    decoder = random_decoder(size, device, dist.group.WORLD if ranks > 1 else None, args.fp8, args.offload)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    between = torch.cuda.memory_reserved()
    cells = (args.height // 16, args.width // 16)
    ids = torch.randint(size.vocab_size, ((args.frames + 7) // 8, *cells), generator=torch.Generator().manual_seed(1))
    times, totals = CallTimes(decoder.network), []
    for _ in range(2):
        times.take()
        torch.cuda.synchronize()
        start = time.perf_counter()
        video = decoder.decode(ids)
        torch.cuda.synchronize()
        totals.append(time.perf_counter() - start)
    calls = times.take()
    assert video.isfinite().all()
    call = statistics.median(calls)
    matrices, attention = flops_per_call(size, CHUNK * cells[0] * cells[1], batch=2, with_text=1, text_rows=TEXT_ROWS)
    floor = (matrices / (2 if args.fp8 else 1) + attention) / ranks / 1e12 / PEAK_TFLOPS
    line = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "ranks": ranks,
        "fp8": args.fp8,
        "offload": args.offload,
        "frames": list(video.shape),
        "network_calls": len(calls),
        "seconds_per_call": round(call, 4),
        "tflops_per_call_and_rank": round((matrices + attention) / ranks / 1e12, 1),
        "share_of_flop_floor": round(floor / call, 3),
        "first_total_seconds": round(totals[0], 2),
        "total_seconds": round(totals[1], 2),
        "seconds_beside_network": round(totals[1] - sum(calls), 2),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "memory_between_gb": round(between / 1e9, 2),
    }
    if args.kernels:
        whole = ids[reflected(len(ids[:CHUNK]), CHUNK)].to(device)
        line["kernels_ms"] = kernel_times(decoder.network, whole, decoder.text_embedding.to(device))
    if not ranks > 1 or dist.get_rank() == 0:
        print(json.dumps(line))
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with torch.no_grad():
        main()
