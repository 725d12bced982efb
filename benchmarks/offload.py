"""How much GPU memory does a video need with each offload setting? One JSON line each, a minute each on an H100.

    python benchmarks/offload.py [--preset 4b] [--settings none decoder tokenizer model]

A clip of 33 frames at 640x1024 in bfloat16 through the whole pipeline, loading included: tokenizer, model, diffusion
decoder, all of the released sizes with random weights. Each setting parks what is named and all before it. 25 frames
are given, so that drawing the rest is quick: the memory is that of any number.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusion import random_decoder
from generate import build
from loader import base_config, write_random_tokenizer
from train_step import environment

from cosmos_mcore.inference.diffusion.network import DiffusionSize
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.parallel.initialize import shut_down
from cosmos_mcore.tokenizer.build import build_tokenizer

SETTINGS = ["none", "decoder", "tokenizer", "model"]
FRAMES, HEIGHT, WIDTH, GIVEN = 33, 640, 1024, 25


def measure(preset: str, setting: str, tokenizer: str) -> dict[str, float]:
    """Makes one video, with what ``setting`` and those before it name parked while it is not used."""
    offloaded = SETTINGS[1 : SETTINGS.index(setting) + 1]
    device = torch.device("cuda", 0)
    decoder = random_decoder(DiffusionSize(), device, None, False, "decoder" in offloaded)
    network = build(preset, (FRAMES, HEIGHT, WIDTH))
    config = base_config([], tokenizer, HEIGHT, WIDTH)
    pipeline = VideoPipeline(
        network, lambda: build_tokenizer(config, device), "model" in offloaded, "tokenizer" in offloaded, decoder
    )
    loading = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    given = torch.rand(1, 3, GIVEN, HEIGHT, WIDTH) * 2 - 1
    start = time.perf_counter()
    pipeline.continue_videos(given, SamplingOptions(1.0, 0.8), [0])
    seconds = round(time.perf_counter() - start, 1)  # with compiling and capturing
    result = {
        "peak_gb": torch.cuda.max_memory_allocated(),
        "peak_reserved_gb": torch.cuda.max_memory_reserved(),
        "loading_gb": loading,
        "between_gb": torch.cuda.memory_allocated(),
    }
    shut_down()
    return {**{name: round(value / 1e9, 2) for name, value in result.items()}, "s": seconds}


def main() -> None:
    """Measures each setting in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = [name for name, arch in PRESETS.items() if not arch.text_to_video]
    parser.add_argument("--preset", default="4b", choices=presets)
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    args = parser.parse_args()
    if len(args.settings) > 1:
        for setting in args.settings:
            subprocess.run([sys.executable, __file__, "--preset", args.preset, "--settings", setting], check=True)
        return
    with TemporaryDirectory() as folder:
        write_random_tokenizer(Path(folder))
        result = measure(args.preset, args.settings[0], folder)
    print(json.dumps({"preset": args.preset, "offloaded_to": args.settings[0], **result, **environment()}), flush=True)


if __name__ == "__main__":
    main()
