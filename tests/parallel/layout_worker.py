"""What one rank of ``test_layouts.py`` runs: ``python -m tests.parallel.layout_worker FOLDER JOB...``.

A job is the name of a layout, which trains from new weights and saves, or ``SAVED>NAME``: the layout NAME continues
from the checkpoint of the layout SAVED. One start of the processes does all jobs, since starting costs more than a job.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from cosmos_mcore.checkpoint.distributed import save_checkpoint
from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.data.index import ClipIndex
from cosmos_mcore.parallel.initialize import data_parallel_rank, data_parallel_world_size, shut_down
from cosmos_mcore.training import setup
from cosmos_mcore.training.optimizer import set_learning_rate
from cosmos_mcore.training.schedule import learning_rate
from cosmos_mcore.training.setup import Run, set_up
from cosmos_mcore.training.step import LossPositions, train_step
from tests.parallel.layouts import ARCHS, LAYOUTS, RESUMED_STEPS, STEPS, config_of, parts_of
from tests.processes import free_port


def global_batch(iteration, layout: VideoLayout, clips, arch):
    """Ids [clips, tokens] and text [clips, length, width] or None of one step: a function of the step alone.

    Some ids are far more frequent than others, so that there is something to learn.
    """
    generator = torch.Generator().manual_seed(1000 + iteration)
    tokens = torch.randint(arch.vocab_size, (clips, layout.num_tokens), generator=generator)
    tokens = tokens**4 // arch.vocab_size**3
    if arch.context_size is None:
        return tokens, None
    return tokens, torch.randn(clips, 7, arch.context_size, generator=generator)


def set_up_without_clips(config, arch) -> Run:
    """The real set-up, but for the files and the vocabulary."""
    with mock.patch.multiple(
        setup,
        resolve_arch=lambda _: arch,
        _shared_index=lambda *_: ClipIndex([None], []),
        build_tokenizer=lambda *_: None,
        ClipLoader=mock.Mock(),
    ):
        return set_up(config)


def train(run: Run, steps):
    """Runs some steps; returns (loss, z-loss, grad norm) of each."""
    config, progress, curve = run.config, run.progress, []
    positions = LossPositions(run.layout, run.arch, config.model.z_loss_coeff, run.device)
    clips = config.training.global_batch_size
    share = slice(*(clips * (data_parallel_rank() + i) // data_parallel_world_size() for i in (0, 1)))
    for iteration in range(progress.iteration, progress.iteration + steps):
        tokens, text = global_batch(iteration, run.layout, clips, run.arch)
        set_learning_rate(run.optimizer, learning_rate(config, iteration))
        text = None if text is None else text[share]
        result = train_step(
            run.model, run.optimizer, positions, tokens[share], config.training.micro_batch_size, context=text
        ).read()
        assert result.updated
        curve.append((result.loss, result.z_loss, result.grad_norm))
    progress.iteration += steps
    return curve


def count_forwards(run: Run):
    """How often this rank's first layer and its attention run, counted from now on."""
    counts = {"layer": 0, "attention": 0}
    for layer in run.chunks[0].decoder.layers[:1]:  # a last stage may have none
        for name, module in (("layer", layer), ("attention", layer.self_attention.core_attention)):
            module.register_forward_pre_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    return counts


def main(folder, jobs, steps=None):
    """Writes FOLDER/JOB.json after each job; ``steps`` replaces the table's number of steps."""
    os.environ["OUTPUT_ROOT"] = str(folder)
    for job in jobs:
        saved, name = parts_of(job)
        config, arch = config_of(name), ARCHS[LAYOUTS[name].model]
        config.job.name = saved or name
        run = set_up_without_clips(config, arch)
        first = run.progress.iteration
        assert bool(first) == (saved is not None)
        forwards = count_forwards(run)
        curve = train(run, steps or (RESUMED_STEPS if saved else STEPS))
        if not saved:
            save_checkpoint(run.checkpoints, run.progress.iteration, run.chunks, run.optimizer, asdict(run.progress))
        if dist.get_rank() == 0:
            (folder / f"{job}.json").write_text(json.dumps({"first": first, "curve": curve, "forwards": forwards}))
        port = [free_port()]
        dist.broadcast_object_list(port)
        shut_down()
        os.environ["MASTER_PORT"] = str(port[0])  # the groups of the next job must not meet what these leave


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
