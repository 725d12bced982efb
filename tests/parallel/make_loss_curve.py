"""Writes ``tests/golden/loss_curve.json`` anew: ``python -m tests.parallel.make_loss_curve``.

Only after a change that is meant to change the numbers of training; say why in CHANGELOG.md.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.conftest import GOLDEN
from tests.parallel.layout_worker import main as run_jobs
from tests.parallel.layouts import CURVE_STEPS

REFERENCES = {"base": "one", "video2world": "v2w-one"}


def main():
    """One process, float32."""
    curves = {}
    with TemporaryDirectory() as folder:
        run_jobs(Path(folder), list(REFERENCES.values()), CURVE_STEPS)
        for model, name in REFERENCES.items():
            curve = json.loads((Path(folder) / f"{name}.json").read_text())["curve"]
            curves[model] = [dict(zip(("loss", "z loss", "grad norm"), step, strict=True)) for step in curve]
    (GOLDEN / "loss_curve.json").write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    main()
