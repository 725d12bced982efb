"""What the process of ``test_distributed.py`` runs: ``python -m tests.checkpoint.distributed_worker FOLDER``."""

import errno
import json
import os
import pickle
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from cosmos_mcore.checkpoint.convert import convert
from cosmos_mcore.checkpoint.distributed import load_checkpoint, load_weights, save_checkpoint
from cosmos_mcore.checkpoint.distributed_reader import read_metadata
from cosmos_mcore.checkpoint.load import load_any_weights
from cosmos_mcore.checkpoint.pointer import latest_checkpoint
from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.parallel.initialize import shut_down
from tests.checkpoint.models import random_weights, save_model
from tests.parallel.layout_worker import set_up_without_clips, train
from tests.parallel.layouts import BASE, config_of
from tests.processes import children_of


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path, prefix):
    """Flips a bit in the middle of a stored output layer."""
    index = MetadataIndex(prefix + "output_layer.weight", [0, 0])
    info = read_metadata(path).storage_data[index]
    with open(path / info.relative_path, "r+b") as file:
        file.seek(info.offset + info.length // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def without_common(path):
    """Makes a checkpoint look as if Megatron-Core 0.19 had written it, if it has not."""
    metadata = read_metadata(path)
    some_place = next(iter(metadata.storage_data.values()))
    metadata.storage_data.setdefault(MetadataIndex("common_state/shard_0_1"), some_place)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / "common.pt").unlink(missing_ok=True)


# Description: (file, what is done to it). The newest Megatron-Core writes no common.pt.
DAMAGES = {
    "truncated tensors": ("__0_0.distcp", truncate),
    "missing tensors": ("__0_0.distcp", Path.unlink),
    "garbage in .metadata": (".metadata", lambda file: file.write_bytes(b"garbage")),
    "no .metadata": (".metadata", Path.unlink),
    "truncated common.pt": ("common.pt", truncate),
    "no common.pt": ("common.pt", Path.unlink),
    "garbage in metadata.json": ("metadata.json", lambda file: file.write_text("{")),
    "no metadata.json": ("metadata.json", Path.unlink),
}

OTHER_MODELS = {
    "wider": {"ffn_hidden_size": 128},
    "deeper": {"num_layers": 9},
    "more words": {"vocab_size": 1024, "embedding_size": 1024},
    "fewer words": {"vocab_size": 256, "embedding_size": 256},
}


def error_of(function, *arguments):
    """The message of the ValueError that a call ends in, or what else happened."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"not a ValueError: {type(error).__name__}: {error}"
    return "no error"


def interrupted_saves(run):
    """What ``latest_checkpoint`` finds after saves that ended at different moments."""
    moments = ("megatron_plan.Plan", "background._write_file", "background.os.replace", "background.write_latest")
    found = {}
    for moment in moments:
        with mock.patch(f"cosmos_mcore.checkpoint.{moment}", side_effect=KeyboardInterrupt):
            try:
                save_checkpoint(run.checkpoints, 4, run.chunks, run.optimizer, asdict(run.progress))
            except (KeyboardInterrupt, OSError):
                found[moment] = latest_checkpoint(run.checkpoints).name
    save_checkpoint(run.checkpoints, 4, run.chunks, run.optimizer, asdict(run.progress))
    found["none of them"] = latest_checkpoint(run.checkpoints).name
    return found


def no_room_for_files(content, place, save=torch.save):
    """As ``torch.save`` where the disk of temporary files is full."""
    if isinstance(place, (str, Path)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))
    save(content, place)


def state_of(run):
    """Copies of all weights and of Adam's moments and step counts."""
    weights = [parameter.detach().clone() for parameter in run.chunks[0].parameters()]
    adam = [value.clone() for state in optimizer_states(run) for value in state.values()]
    return weights + adam


def optimizer_states(run):
    for inner in run.optimizer.chained_optimizers:
        yield from inner.optimizer.state.values()


def main(folder):
    """Writes FOLDER/results.json."""
    os.environ["OUTPUT_ROOT"] = str(folder)
    config = config_of("one")
    run = set_up_without_clips(config, BASE)
    train(run, 3)
    before, forks = state_of(run), []
    os.register_at_fork(before=lambda: forks.append(1))
    path = save_checkpoint(run.checkpoints, 3, run.chunks, run.optimizer, asdict(run.progress))
    results = {"forks": len(forks), "children": children_of(os.getpid())}
    results["files"] = sorted(file.name for file in run.checkpoints.iterdir())

    train(run, 1)
    results["moved"] = not any(torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True))
    results["progress"] = load_checkpoint(path, run.chunks, run.optimizer)
    results["restored"] = [torch.equal(a, b) for a, b in zip(before, state_of(run), strict=True)]
    results["steps"] = [group["step"] for inner in run.optimizer.chained_optimizers for group in inner.param_groups]

    def build(arch):
        return build_model(config, arch, derive_video_layout(config), torch.device("cpu"))

    weights = build(BASE)
    for load in (lambda: load_weights(path, weights), lambda: load_any_weights(path, BASE, weights)):
        for parameter in weights[0].parameters():
            parameter.data.zero_()
        load()
        found = [torch.equal(a, b) for a, b in zip(before, weights[0].parameters(), strict=False)]
        results.setdefault("weights", []).append(all(found))
    copy = shutil.copytree(path, folder / "flipped")
    for kind in ("optimizer.state.exp_avg.", ""):
        flip(copy, kind)
        results[f"flipped {kind}"] = error_of(load_any_weights, copy, BASE, weights)
    others = {name: build(replace(BASE, **sizes)) for name, sizes in OTHER_MODELS.items()}
    results["other models"] = {name: error_of(load_weights, path, chunks) for name, chunks in others.items()}
    save_model(folder / "v2w.pt", random_weights(replace(BASE, embedding_size=576, context_size=24)))
    convert(folder / "v2w.pt", folder / "v2w", "distributed")
    results["text"] = error_of(load_weights, folder / "v2w", weights)
    with mock.patch.object(run.chunks[0], "arch", replace(BASE, vocab_size=1024)):
        results["resumed"] = error_of(load_checkpoint, path, run.chunks, run.optimizer)

    results["damages"] = {}
    for name, (file, damage) in DAMAGES.items():
        if not (path / file).exists():
            continue
        copy = shutil.copytree(path, folder / "damaged")
        damage(copy / file)
        results["damages"][name] = error_of(load_checkpoint, copy, run.chunks, run.optimizer)
        shutil.rmtree(copy)
    without_common(copy := shutil.copytree(path, folder / "newer"))
    results["newer"] = error_of(load_weights, copy, weights)
    with mock.patch.object(torch, "save", no_room_for_files):
        path = save_checkpoint(folder / "no room", 3, run.chunks, run.optimizer, asdict(run.progress))
    results["no room"] = load_checkpoint(path, run.chunks, run.optimizer) == asdict(run.progress)
    results["interrupted"] = interrupted_saves(run)
    (folder / "results.json").write_text(json.dumps(results))
    shut_down()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
