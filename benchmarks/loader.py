"""Does the loader keep a GPU fed? Decoding, tokenizing, and whole training steps, cold and from the token cache.

    python benchmarks/loader.py VIDEOS... [--tokenizer FOLDER] [--parts decode encode loader train]

``decode``  clips/s of decoding and transforming 33 frames to 384x640, with the use of the video engines (NVDEC), and
            the mean difference to PyAV's pixels.
``encode``  ms per clip of the tokenizer's encoder at 33x384x640 and 33x640x848; with --tokenizer, of the file, too.
``loader``  clips/s of the loader alone: first epoch, then from the cache.
``train``   ``conf/teal_tp1.yaml`` for two epochs: step and data wait in the first one and in the second one.

Without ``--tokenizer``, a DV8x16x16 with random weights stands in for the released one: the same work, other ids.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from cosmos_mcore.config import load_config
from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.data.decode import PyAVDecoder, build_decoder
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.loader import ClipLoader
from cosmos_mcore.data.sampler import ClipSampler
from cosmos_mcore.tokenizer import fsq
from cosmos_mcore.tokenizer.build import build_tokenizer
from cosmos_mcore.tokenizer.networks import DV8X16X16, Decoder, Encoder

ROOT = Path(__file__).parents[1]
DEVICE = torch.device("cuda", 0)


class RandomEncoder(Encoder):
    """As the released file: gives ids, codes and a loss."""

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, 3, T, H, W] to ids and the rest."""
        ids = fsq.quantize(super().forward(video))
        return ids, fsq.ids_to_codes(ids), torch.zeros(())


class RandomDecoder(Decoder):
    """As the released file: takes ids."""

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T', h, w] to frames."""
        return super().forward(fsq.ids_to_codes(ids))


def write_random_tokenizer(folder: Path) -> None:
    """Writes ``encoder.jit`` and ``decoder.jit`` of the released size."""
    torch.manual_seed(0)
    examples = (torch.zeros(1, 3, 1, 16, 16), torch.zeros(1, 1, 1, 1, dtype=torch.int32))
    networks = (RandomEncoder(DV8X16X16), RandomDecoder(DV8X16X16))
    for name, network, example in zip(("encoder.jit", "decoder.jit"), networks, examples, strict=True):
        traced = torch.jit.trace(network.requires_grad_(False).eval(), example, check_trace=False)
        torch.jit.save(traced, str(folder / name))


def base_config(videos: list[str], tokenizer: str, height: int = 384, width: int = 640) -> RunConfig:
    """One clip per step of the given size, no cache."""
    config = RunConfig()
    config.data.path, config.data.height, config.data.width = videos, height, width
    config.data.token_cache = None
    config.tokenizer.name, config.tokenizer.path = "dv8x16x16", tokenizer
    return config


@contextmanager
def nvdec_use() -> Iterator[list[float]]:
    """Samples the use of the video engines in percent, five times a second."""
    samples: list[float] = []
    query = ["nvidia-smi", "--query-gpu=utilization.decoder", "--format=csv,noheader,nounits", "-i", "0", "-lms", "200"]
    try:
        # One process all the time: starting one for each sample would slow the driver down for the decoders.
        process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
    except OSError:
        yield samples
        return
    yield samples
    process.terminate()
    for line in process.communicate()[0].splitlines():
        with suppress(ValueError):
            samples.append(float(line))


def bench_decode(config: RunConfig, clips_wanted: int) -> None:
    """Decoding and transforming alone."""
    index = index_clips(config.data)
    decoder = build_decoder(config.data, DEVICE)
    numbers = [i * 7 % len(index.clips) for i in range(clips_wanted)]
    depth: list[int] = []

    def one(number: int) -> None:
        decoder.decode(index.clips[number])
        depth.append(getattr(decoder, "waiting", 0))

    with ThreadPoolExecutor(decoder.parallel_clips) as pool:
        list(pool.map(one, numbers[:64]))  # warm up
        depth.clear()
        with nvdec_use() as samples:
            start, busy = time.perf_counter(), time.process_time()
            list(pool.map(one, numbers))
            seconds, busy = time.perf_counter() - start, time.process_time() - busy
    use = f"{statistics.mean(samples):.0f} %, at most {max(samples):.0f} %" if samples else "unknown"
    print(
        f"decode: {decoder.name}, {len(numbers) / seconds:.1f} clips/s; NVDEC use {use}; "
        f"queue depth {statistics.mean(depth):.1f}; {busy / seconds:.1f} CPUs busy; "
        f"by PyAV {getattr(decoder, 'on_cpu', 0)}, given up {getattr(decoder, 'abandoned', 0)}",
        flush=True,
    )
    pyav = PyAVDecoder(config.data)
    for number in range(0, len(index.clips), max(1, len(index.clips) // 6)):
        clip = index.clips[number]
        difference = (decoder.decode(clip).cpu().float() - pyav.decode(clip).float()).abs()
        print(
            f"  {Path(clip.path).name} from {clip.first_frame}: differs from PyAV by {difference.mean():.3f} of 255 "
            f"on average, {difference.max():.0f} at most"
        )
    decoder.close()


def bench_encode(videos: list[str], tokenizer_folder: str, engines: tuple[str, ...]) -> None:
    """The encoder alone, on real frames, as the loader calls it."""
    for height, width in ((384, 640), (640, 848)):
        config = base_config(videos, tokenizer_folder, height, width)
        decoder, index = build_decoder(config.data, DEVICE), index_clips(config.data)
        frames = decoder.decode(index.clips[0]).to(DEVICE)
        video = frames.transpose(0, 1).float().div(127.5).sub(1)[None].repeat(8, 1, 1, 1, 1)
        decoder.close()
        for engine in engines:
            config.tokenizer.engine = engine
            tokenizer = build_tokenizer(config, DEVICE)
            if engine == "jit":
                video = video[:4]
            for _ in range(3):
                tokenizer.encode(video)
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(5):
                ids = tokenizer.encode(video)
            torch.cuda.synchronize()
            ms = (time.perf_counter() - start) / 5 / len(video) * 1e3
            same = all(torch.equal(ids[i], ids[0]) for i in range(len(video)))
            memory = torch.cuda.max_memory_allocated() / 2**30
            print(
                f"encode: {engine} {video.shape[2]}x{height}x{width}: {ms:.1f} ms per clip; equal clips give equal "
                f"ids: {same}; peak memory {memory:.1f} GiB; {tokenizer.fingerprint}",
                flush=True,
            )
            torch.cuda.reset_peak_memory_stats()


def bench_loader(config: RunConfig, folder: Path) -> None:
    """The loader without a model: a first epoch, then the same from the cache, and that both give the same ids."""
    config.data.token_cache = str(folder / "cache")
    config.training.global_batch_size, config.data.prefetch_steps = 4, 8
    tokenizer, index = build_tokenizer(config, DEVICE), index_clips(config.data)
    steps = len(index.clips) // 4
    found = []
    for name in ("first epoch", "from the cache"):
        loader = ClipLoader(
            index,
            ClipSampler(len(index.clips), 0),
            tokenizer,
            config,
            derive_video_layout(config),
            data_parallel_rank=0,
            data_parallel_size=1,
            replica_group=None,
            device=DEVICE,
        )
        loader.next()
        start = time.perf_counter()
        found.append(torch.stack([loader.next().ids for _ in range(steps - 1)]))
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        print(f"loader: {name}: {4 * (steps - 1) / seconds:.1f} clips/s; steps ready {loader.ready_steps}", flush=True)
        loader.close()
    print(f"loader: ids from the cache equal those made on the spot: {torch.equal(*found)}")


def bench_train(videos: list[str], tokenizer_folder: str, folder: Path, overrides: list[str]) -> None:
    """Two epochs of the 4B on one GPU."""
    keys = [f"data.path=[{','.join(videos)}]", f"tokenizer.path={tokenizer_folder}", "checkpoint.load=null", *overrides]
    config = load_config(ROOT / "conf" / "teal_tp1.yaml", keys)
    batch = config.training.global_batch_size
    per_epoch = len(index_clips(config.data).clips) // batch
    keys += [f"training.train_iters={10 * per_epoch}", f"checkpoint.save_interval={10 * per_epoch}"]
    command = [sys.executable, "examples/pretrain_cosmos_ar.py", "conf/teal_tp1.yaml", *keys]
    environment = {**os.environ, "OUTPUT_ROOT": str(folder), "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    folder.mkdir(exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    job = config.job
    metrics = folder / job.project / job.group / job.name / "metrics.jsonl"
    records: list[dict[str, float]] = []
    while len(records) < 2 * per_epoch and process.poll() is None:
        time.sleep(1)
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    process.kill()  # a checkpoint tells nothing here
    process.wait()
    if len(records) < 2 * per_epoch:
        sys.exit((folder / "log.txt").read_text()[-4000:] + "\ntrain: the run has ended early")
    edge = min(10, per_epoch // 4)  # the start, and the clips that are read ahead into the second epoch
    epochs = {
        "first epoch": records[edge : per_epoch - edge],
        "second epoch": records[per_epoch + edge : 2 * per_epoch],
    }
    medians = {}
    for name, part in epochs.items():
        step = statistics.median(record["elapsed time per iteration (ms)"] for record in part)
        wait = statistics.mean(record["data wait (ms)"] for record in part)
        mean = statistics.mean(record["elapsed time per iteration (ms)"] for record in part)
        medians[name] = step
        print(
            f"train: {name}: {step:.1f} ms per step (median), {1e3 * batch / mean:.2f} clips/s (mean), data wait "
            f"{wait:.1f} ms = {100 * wait / mean:.2f} % of the step",
            flush=True,
        )
    print(f"train: the first epoch's step takes {medians['first epoch'] / medians['second epoch']:.3f} of the second's")


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", help="MP4 files or folders")
    parser.add_argument("--tokenizer", help="folder with encoder.jit and decoder.jit; default: random weights")
    parser.add_argument("--parts", nargs="+", default=["decode", "encode", "loader", "train"])
    parser.add_argument("--clips", type=int, default=600, help="clips that the decode part reads")
    parser.add_argument("--train", nargs="*", default=[], metavar="section.key=value", help="overrides of the run")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {os.cpu_count()} CPUs")
    with TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = arguments.tokenizer
        if tokenizer is None:
            write_random_tokenizer(folder)
            tokenizer = name
        if "decode" in arguments.parts:
            bench_decode(base_config(arguments.videos, tokenizer), arguments.clips)
        if "encode" in arguments.parts:
            # What traced random weights at another size gives means nothing.
            engines = ("eager",) if arguments.tokenizer is None else ("eager", "jit")
            bench_encode(arguments.videos, tokenizer, engines)
        if "loader" in arguments.parts:
            bench_loader(base_config(arguments.videos, tokenizer), folder)
        if "train" in arguments.parts:
            bench_train(arguments.videos, tokenizer, folder / "run", arguments.train)


if __name__ == "__main__":
    main()
