"""How much of a video survives a tokenizer? PSNR of encode and decode, per file and for clips of moving shapes.

    python benchmarks/tokenizer_psnr.py [VIDEOS...] [--tokenizer haar] [--height 384] [--width 640] [--pictures FOLDER]

Takes the first 33 frames of each file. PSNR is over the RGB values of all frames, and of frames 0, 8, 16, ... only,
against the resized frames.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from cosmos_mcore.config.schema import DataConfig, RunConfig, TokenizerConfig
from cosmos_mcore.data.decode import build_decoder
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.synthetic import make_shape_clips
from cosmos_mcore.data.transforms import normalize
from cosmos_mcore.tokenizer.build import build_tokenizer

FRAMES_SHOWN = (0, 4, 8, 32)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """PSNR in dB of videos in -1..1."""
    return -10 * math.log10(((one - other) / 2).square().mean().item())


def measure(config: RunConfig, device: torch.device, pictures: Path | None) -> None:
    """Prints one row per file."""
    tokenizer, decoder = build_tokenizer(config, device), build_decoder(config.data, device)
    scores = []
    for clip in index_clips(config.data).clips:
        video = normalize(decoder.decode(clip).to(device))[None]
        start = time.perf_counter()
        ids = tokenizer.encode(video)
        distinct = ids.unique().numel()  # also waits for the GPU
        middle = time.perf_counter()
        decoded = tokenizer.decode(ids).float().clamp(-1, 1).cpu()
        end = time.perf_counter()
        scores.append(psnr(decoded, video.cpu()))
        keyframes = psnr(decoded[:, :, ::8], video.cpu()[:, :, ::8])
        name = Path(clip.path).stem
        print(
            f"{name:20s} {scores[-1]:6.2f} {keyframes:10.2f} {distinct:7d} of {ids.numel():6d} "
            f"{middle - start:6.2f} {end - middle:6.2f}"
        )
        if pictures is not None:
            rows = [torch.cat([each[0, :, frame] for frame in FRAMES_SHOWN], dim=2) for each in (video.cpu(), decoded)]
            pixels = ((torch.cat(rows, dim=1) + 1) * 127.5).round().byte().permute(1, 2, 0)
            Image.fromarray(pixels.numpy()).save(pictures / f"{name}.png")
    decoder.close()
    print(f"{'mean':20s} {sum(scores) / len(scores):6.2f}")


def main() -> None:
    """Reads the command line and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="*", help="MP4 files or folders, measured before the moving shapes")
    parser.add_argument("--tokenizer", default="haar")
    parser.add_argument("--tokenizer-path", help="folder with the tokenizer's weights")
    parser.add_argument("--height", type=int, default=384)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument(
        "--pictures", type=Path, help="write a PNG for each file here: frames above, their round trip below"
    )
    arguments = parser.parse_args()
    if arguments.pictures is not None:
        arguments.pictures.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = TokenizerConfig(arguments.tokenizer, arguments.tokenizer_path)
    one_per_file = {"num_frames": 33, "start_frame_interval": 2**31}
    print(f"{arguments.tokenizer} on {device.type}")
    print(f"{'clip':20s} {'PSNR':>6s} {'every 8th':>10s} {'distinct ids':>17s} {'enc s':>6s} {'dec s':>6s}")
    if arguments.videos:
        data = DataConfig(path=arguments.videos, height=arguments.height, width=arguments.width, **one_per_file)
        measure(RunConfig(tokenizer=tokenizer, data=data), device, arguments.pictures)
    with TemporaryDirectory() as folder:
        make_shape_clips(folder, num_clips=6)
        data = DataConfig(path=folder, height=96, width=160, **one_per_file)
        measure(RunConfig(tokenizer=tokenizer, data=data), device, arguments.pictures)


if __name__ == "__main__":
    main()
