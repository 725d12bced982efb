"""What the ranks of ``test_saving.py`` run: ``python -m tests.training.saving_worker FOLDER``."""

import errno
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from cosmos_mcore.checkpoint import background
from cosmos_mcore.checkpoint.pointer import complete_checkpoints, iteration_of, latest_checkpoint
from cosmos_mcore.checkpoint.reader import MOMENTS, WEIGHT
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.resume import resume
from cosmos_mcore.parallel.agreement import gather_to_all
from cosmos_mcore.parallel.initialize import shut_down
from cosmos_mcore.training import trainer as trainer_module
from cosmos_mcore.training.callbacks import Callback
from cosmos_mcore.training.saving import Saver
from cosmos_mcore.training.stopping import StopRequests
from tests.parallel.layout_worker import set_up_without_clips, train
from tests.parallel.layouts import BASE, config_of


class Log:
    """The errors and warnings of the package."""

    def __init__(self):
        self.lines = []
        names = ("training.saving", "checkpoint.resume", "checkpoint.background")
        for name in names:
            module = sys.modules[f"cosmos_mcore.{name}"]
            module.logger = mock.Mock()
            module.logger.warning = lambda text, *values: self.lines.append(text % values)
            module.logger.log = lambda level, text, *values: self.lines.append(text % values)

    def drain(self):
        """What rank 0 has said; the others say nothing of what all ranks know."""
        found, self.lines = self.lines, []
        first, *others = gather_to_all(found)
        assert not any(others), others
        return first


def full_disk_on_rank_1(descriptor):
    if dist.get_rank() == 1:
        raise OSError(errno.ENOSPC, "No space left on device")


def step_and_update(run, saver):
    """What the trainer does round a step."""
    train(run, 1)
    flags = [max(values) for values in zip(*gather_to_all(saver.flags()), strict=True)]
    saver.update(*flags)


def failures(run, log):
    """Saves that fail in several ways, and what comes after."""
    found, saved = {}, []
    saver = Saver(run, lambda iteration, path: saved.append(iteration))
    folder = run.checkpoints
    folder.parent.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        folder.write_text("a file where the folder should be")
    dist.barrier()
    train(run, 1)
    saver.save()
    found["not a folder"] = (log.drain(), list(saved))
    dist.barrier()
    if dist.get_rank() == 0:
        folder.unlink()
    dist.barrier()
    time.sleep(0.1)  # retry_seconds is less
    step_and_update(run, saver)
    while saver._save.busy:
        step_and_update(run, saver)
    found["mended"] = (log.drain(), list(saved))

    good = latest_checkpoint(folder).name
    with mock.patch.object(background.os, "fsync", full_disk_on_rank_1):
        train(run, 1)
        saver.save()
        saver._ended(saver._save.wait())
    found["full disk"] = (log.drain(), list(saved), latest_checkpoint(folder).name == good)

    with mock.patch.object(background, "write_latest", side_effect=OSError(errno.EROFS, "Read-only file system")):
        try:
            for _ in range(5):
                saver.save()
                saver._ended(saver._save.wait())
        except ValueError as error:
            found["limit"] = str(error)
    log.drain()

    failing = iter([OSError(errno.ENOSPC, "No space left on device")])
    write = background.write_latest
    saver = Saver(run, lambda iteration, path: saved.append(iteration))
    train(run, 1)
    with mock.patch.object(background, "write_latest", side_effect=lambda *args: fail_or(write, failing, *args)):
        saver.finish()
    found["done"] = (log.drain(), latest_checkpoint(folder) == folder / f"iter_{run.progress.iteration:09d}")
    return found


def fail_or(work, failing, *arguments):
    """Fails as often as there are errors, then works."""
    for error in failing:
        raise error
    work(*arguments)


def without_room_for_exports(run, log):
    """Saves, while the original's files cannot be written beside the checkpoints."""
    settings = run.config.checkpoint
    settings.export_original, settings.keep_every = True, None
    saver = Saver(run, lambda *_: None)
    with mock.patch("cosmos_mcore.training.saving.write_training", side_effect=ValueError("x.pt cannot be written")):
        for _ in range(2):
            train(run, 1)
            saver.save()
            saver._ended(saver._save.wait())
    settings.export_original, settings.keep_every = False, 5
    left = [iteration_of(path) for path in complete_checkpoints(run.checkpoints)]
    return log.drain(), left, run.progress.iteration


def kept(run, log):
    saver = Saver(run, lambda *_: None)
    for _ in range(4):
        train(run, 1)
        saver.save()
    saver.finish()
    return [iteration_of(path) for path in complete_checkpoints(run.checkpoints)], run.progress.iteration, log.drain()


def exported(run, log):
    """The original's files beside each save: what they hold, against the distributed checkpoint of the same name."""
    found = {}
    run.config.checkpoint.export_original = True
    for size in (1, 2):
        run.config.parallel.tensor_model_parallel_size = size  # here it only says for whom the files are
        saver = Saver(run, lambda *_: None)
        train(run, 1)
        saver.save()
        saver.finish()
        ours = open_checkpoint(latest_checkpoint(run.checkpoints))
        theirs = open_checkpoint(ours.path.with_suffix(".pt"))
        same = all(
            torch.equal(theirs.read(name, state), ours.read(name, state).to(theirs.dtype(name, state)))
            for name in ours.names
            for state in (WEIGHT, *MOMENTS)
        )
        steps = theirs.training.iteration == theirs.training.step == run.progress.iteration
        files = sorted(path.name[len("iter_000000000") :] for path in run.checkpoints.glob(f"{ours.path.name}*.pt"))
        found[size] = (theirs.layout, theirs.tensor_parallel_size, same, steps, files)
        dist.barrier()
    run.config.checkpoint.export_original, run.config.parallel.tensor_model_parallel_size = False, 1
    return found, log.drain()


def damaged(run, log):
    """Flips a bit of the newest checkpoint and resumes."""
    newest = latest_checkpoint(run.checkpoints)
    before = complete_checkpoints(run.checkpoints)[-2]
    if dist.get_rank() == 0:
        file = newest / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    dist.barrier()
    progress = resume(run.checkpoints, run.chunks, run.optimizer)
    dist.barrier()  # rank 0 moves the folders
    return {
        "iteration": progress["iteration"] == iteration_of(before),
        "named": latest_checkpoint(run.checkpoints) == before,
        "aside": newest.with_name(newest.name + ".damaged").is_dir() and not newest.exists(),
        "log": log.drain(),
    }


class FullDisk(Callback):
    """Cannot write."""

    def on_save(self, iteration, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_train_end(self):
        self.on_save(0, None)


def stopped_while_waiting(run):
    """A request to stop ends a wait for clips that never come, and what has been trained is saved.

    A callback that cannot write is named once, and changes nothing.
    """
    trainer_module.logger.warning = mock.Mock()
    run.loader.ready = lambda seconds=0.0: dist.get_rank() == 0 and not time.sleep(seconds)
    stops = StopRequests(run.checkpoints.parent, None)
    with stops.listening():
        if dist.get_rank() == 1:
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        trainer = trainer_module.Trainer(run, callbacks=[FullDisk()], stops=stops)
        train(run, 1)
        reason = trainer.train()
    warnings = [call.args[0] % call.args[1:] for call in trainer_module.logger.warning.call_args_list]
    return reason.name, iteration_of(latest_checkpoint(run.checkpoints)) == run.progress.iteration, warnings


def main(folder):
    """Writes FOLDER/results.json."""
    os.environ["OUTPUT_ROOT"] = str(folder)
    config = config_of("dp2-distributed-optimizer")
    config.checkpoint.retry_seconds, config.checkpoint.max_save_failures = 0.01, 3
    config.checkpoint.keep, config.checkpoint.keep_every = 2, 5
    run = set_up_without_clips(config, BASE)
    log = Log()
    results = {"failures": failures(run, log), "kept": kept(run, log), "exported": exported(run, log)}
    results["damaged"] = damaged(run, log)
    results["exports"] = without_room_for_exports(run, log)
    results["stopped"] = stopped_while_waiting(run)
    results["other folders"] = [p.name for p in run.checkpoints.iterdir() if p.suffix in (".incomplete", ".removed")]
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
