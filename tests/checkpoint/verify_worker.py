"""What the process of ``test_verify.py`` runs: ``python -m tests.checkpoint.verify_worker FOLDER``."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch

from cosmos_mcore.checkpoint import verify as module
from cosmos_mcore.checkpoint.convert import convert
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.checkpoint.training_files import write_original


def result_of(source, output):
    """The report, or the error."""
    try:
        report = module.verify(source, output)
    except ValueError as error:
        return {"error": str(error)}
    return {**json.loads(json.dumps(asdict(report), default=str)), "table": report.table()}


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
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
