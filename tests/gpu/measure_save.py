"""Measures saves in the background on GPUs; prints one JSON line per save, and whether what was saved comes back.

    python -m tests.gpu.measure_save FOLDER conf/teal_tp1.yaml [section.key=value ...]
    torchrun --nproc-per-node 4 -m tests.gpu.measure_save FOLDER conf/teal_tp4.yaml

Random weights and ids. FOLDER needs room for one checkpoint: of 4B 56 GB, or 40 with precision.moments=bf16.
"""

import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from cosmos_mcore.checkpoint.background import BackgroundSave
from cosmos_mcore.checkpoint.checksums import check_checksums
from cosmos_mcore.checkpoint.distributed import load_checkpoint, plan_checkpoint
from cosmos_mcore.config import derive_video_layout, load_config
from cosmos_mcore.config.derived import data_parallel_size
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.parallel.agreement import largest
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.saving import _before_update
from cosmos_mcore.training.setup import build_trainable
from cosmos_mcore.training.step import LossPositions, train_step

SAVES, STEPS = 3, 8


def main(folder, config_path, overrides):
    """Trains and saves."""
    config = load_config(config_path, overrides)
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    device = groups.initialize(config.parallel, config.training.seed)
    chunks, model, optimizer = build_trainable(config, arch, layout, device)
    torch.manual_seed(0)
    for parameter in chunks[0].parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    optimizer.reload_model_params()
    clips = config.training.global_batch_size // data_parallel_size(config, dist.get_world_size())
    ids = torch.randint(arch.vocab_size, (clips, layout.num_tokens), device=device)
    positions = LossPositions(layout, arch, config.model.z_loss_coeff, device)
    set_learning_rate(optimizer, 1e-5)
    save = BackgroundSave(folder)
    _before_update(optimizer, save.fence)

    def step():
        train_step(model, optimizer, positions, ids, config.training.micro_batch_size)
        torch.cuda.synchronize()

    def timed(steps):
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            times.append(time.perf_counter() - began)
        return times

    timed(3)
    usual = statistics.median(timed(STEPS))
    began = time.perf_counter()
    save.prepare(*plan_checkpoint(chunks, optimizer, {}))
    prepared = time.perf_counter() - began
    for number in range(1, SAVES + 1):
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        plan_checkpoint(chunks, optimizer, {}, check=False)
        planned = time.perf_counter() - began
        probe = [parameter.detach().float().norm().item() for parameter in chunks[0].parameters()]
        torch.cuda.synchronize()
        began = time.perf_counter()
        assert save.start(number, lambda: plan_checkpoint(chunks, optimizer, {"iteration": 1}, check=False)) is None
        started = time.perf_counter() - began
        first = timed(1)[0]
        during = []
        while save.busy:
            during += timed(1)
            if not largest(int(not save.part_done()))[0]:
                result = save.advance() or None
        if dist.get_rank() == 0:
            record = {
                "save": number,
                "errors": result.errors,
                "blocked seconds (host and fence)": result.blocked_seconds,
                "of that planning": planned,
                "of that start": started,
                "step before (s)": usual,
                "first step after the start (s)": first,
                "blocked as seen in the steps (s)": started + first - usual,
                "steps while writing, median (s)": statistics.median(during),
                "all on disk after (s)": result.total_seconds,
                "GB": result.num_bytes / 1e9,
                "GB/s": result.num_bytes / 1e9 / result.total_seconds,
                "host memory (GB)": result.host_bytes / 1e9,
                "locking host memory, once (s)": prepared,
                "GPU memory, peak (GB)": torch.cuda.max_memory_allocated() / 1e9,
            }
            print(json.dumps(record), flush=True)
    began = time.perf_counter()
    check_checksums(result.path, dist.get_rank(), dist.get_world_size())
    checked = time.perf_counter() - began
    timed(2)
    began = time.perf_counter()
    load_checkpoint(result.path, chunks, optimizer)
    loaded = time.perf_counter() - began
    found = [parameter.detach().float().norm().item() for parameter in chunks[0].parameters()]
    same = found == probe
    if dist.get_rank() == 0:
        print(json.dumps({"weights come back": same, "checksums (s)": checked, "load (s)": loaded}), flush=True)
    assert same
    groups.shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
