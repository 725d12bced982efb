"""What the process of ``test_verify.py`` runs: ``python -m tests.checkpoint.verify_worker FOLDER``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch

from cosmos_mcore.checkpoint import verify as module
from cosmos_mcore.checkpoint.convert import LAYOUTS, convert
from cosmos_mcore.checkpoint.load import load_any_weights, named_entries
from cosmos_mcore.checkpoint.names import local_value
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.builder import build_model
from cosmos_mcore.parallel.initialize import initialize, shut_down
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.checkpoint.training_files import write_original


def result_of(source, output):
    """The report, or the error."""
    try:
        report = module.verify(source, output)
    except ValueError as error:
        return {"error": str(error)}
    return {**json.loads(json.dumps(asdict(report), default=str)), "table": report.table()}


def loaded(folder, source):
    """For each layout, and the forms of model.pt, whether ``checkpoint.load`` of it gives the weights of ``source``."""
    checkpoint, config = open_checkpoint(source), RunConfig()
    arch = checkpoint.arch
    device = initialize(config.parallel, seed=0)
    layout = VideoLayout(1, (1, 4, 4), arch.text_to_video, 16 + arch.text_to_video, 0)
    chunks = build_model(config, arch, layout, device)
    results = {}
    for to, form in (*((to, "prefixed") for to in LAYOUTS), ("monolithic", "plain"), ("monolithic", "nested")):
        place = folder / f"{to}-{form}"
        path = place if to in ("safetensors", "distributed", "training") else place / "model.pt"
        size = 1 if to in ("monolithic", "safetensors") else 4
        convert(source, path, to, tensor_parallel_size=size, form=form)
        with torch.no_grad():
            for parameter in chunks[0].parameters():
                parameter.fill_(torch.nan)
        load_any_weights(path, arch, chunks)
        results[f"{to}-{form}"] = all(
            torch.equal(parameter, local_value(checkpoint.read, entry, arch, 0, 1))
            for entry, parameter in named_entries(chunks, arch)
        )
    shut_down()
    return results


def main(folder):
    """Writes FOLDER/results.json."""
    results = {}
    for preset in ("12b", "5b-video2world"):
        model = save_model(folder / preset / "model.pt", random_weights(reduced(preset)))
        convert(model, folder / preset / "hub", "safetensors")
        results[preset] = result_of(model, folder / preset / "hub")

    weights = random_weights(reduced("12b"))
    weights["layers.2.attention.wk.weight"][0, 0] += 0.5
    other = save_model(folder / "other.pt", weights)
    results["different"] = result_of(folder / "12b" / "model.pt", other)
    weights["layers.2.attention.wk.weight"][0, 0] = torch.nan
    nan = save_model(folder / "nan.pt", weights)
    results["nan"] = result_of(nan, nan)
    results["other model"] = result_of(folder / "12b" / "model.pt", folder / "5b-video2world" / "model.pt")
    with mock.patch.object(module, "_free_memory", lambda _: 10):
        results["no memory"] = result_of(folder / "12b" / "model.pt", folder / "12b" / "hub")

    write_original(folder / "run", reduced("4b"))
    convert(folder / "run", folder / "distributed", "distributed")
    results["training"] = result_of(folder / "run", folder / "distributed")
    results["back"] = result_of(folder / "distributed", folder / "run")
    write_original(folder / "text", reduced("13b-video2world"), 2)
    results["loaded"] = loaded(folder / "loaded", folder / "text")
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
