"""Numbers of every logged iteration: ``metrics.jsonl``, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosmos_mcore.training.callbacks.base import Callback, StepReport


def metrics(report: StepReport) -> dict[str, float]:
    """The numbers under Megatron's log names; those that were not measured are left out."""
    numbers = {
        "iteration": report.iteration,
        "consumed samples": report.consumed_samples,
        "elapsed time per iteration (ms)": report.step_seconds * 1e3,
        "data wait (ms)": report.data_seconds * 1e3,
        "throughput per GPU (TFLOP/s/GPU)": report.tflops,
        "tokens/s/GPU": report.tokens_per_second,
        "learning rate": report.learning_rate,
        "global batch size": report.global_batch_size,
        "lm loss": report.lm_loss,
        "z loss": report.z_loss,
        "grad norm": report.grad_norm,
        "number of skipped iterations": report.skipped_iterations,
        "number of nan iterations": report.nan_iterations,
        "memory (GiB)": report.memory_gib,
    }
    if report.mfu is not None:
        numbers["MFU"] = report.mfu
    if report.token_accuracy is not None:
        numbers["token accuracy"] = report.token_accuracy
    numbers |= {f"lm loss of latent frame {i}": loss for i, loss in enumerate(report.frame_losses, 1)}
    if report.validation is not None:
        numbers["validation lm loss"] = report.validation.loss
        assert report.validation.token_accuracy is not None
        numbers["validation token accuracy"] = report.validation.token_accuracy
        frames = enumerate(report.validation.frame_losses, 1)
        numbers |= {f"validation lm loss of latent frame {i}": loss for i, loss in frames}
    return numbers


class MetricsFile(Callback):
    """Appends one JSON object per report to ``metrics.jsonl``.

    A resumed run first drops what an interrupted one wrote after its last checkpoint, so the file is one curve. The
    first object after a resume has ``resumed from``; a loss or norm that is not finite is ``null``; an object that
    comes with newly skipped files lists them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, iteration: int) -> None:
        """Keeps the records up to ``iteration``."""
        kept = []
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a killed run may be torn
                if record["iteration"] <= iteration:
                    kept.append(line)
        temporary = self.path.with_suffix(".incomplete")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)

    def on_report(self, report: StepReport) -> None:
        """Appends the object in one write."""
        # JSON has no infinity and nothing that is not a number.
        record: dict[str, Any] = {name: n if math.isfinite(n) else None for name, n in metrics(report).items()}
        if report.resumed_from is not None:
            record["resumed from"] = report.resumed_from
        if report.skipped_files:
            record["skipped files"] = [asdict(file) for file in report.skipped_files]
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")


class TensorBoard(Callback):
    """Writes event files into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: Any = None

    def on_train_start(self, iteration: int) -> None:
        """Opens the event file; points after ``iteration`` that a killed run left are hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(self.folder), purge_step=iteration + 1)

    def on_report(self, report: StepReport) -> None:
        """Adds one point per number."""
        for name, value in metrics(report).items():
            if name != "iteration":
                self.writer.add_scalar(name, value, report.iteration)

    def on_sample(self, iteration: int, strip: Path) -> None:
        """Adds the picture."""
        self.writer.add_image("sample", np.asarray(Image.open(strip).convert("RGB")), iteration, dataformats="HWC")

    def on_train_end(self) -> None:
        """Closes the event file."""
        if self.writer is not None:
            self.writer.close()


class WandB(Callback):
    """Sends the numbers to Weights & Biases; a resumed run continues its page."""

    def __init__(self, project: str, name: str, config: dict[str, Any]) -> None:
        """Checks that the package is there.

        Raises:
            ValueError: if it is not.
        """
        try:
            import wandb
        except ImportError:
            raise ValueError(
                "logging.wandb_project is set but wandb is not installed: pip install 'cosmos_mcore[wandb]', or set it "
                "to null"
            ) from None
        self.run = wandb.init(project=project, name=name, id=name, resume="allow", config=config)

    def on_report(self, report: StepReport) -> None:
        """Sends one point."""
        self.run.log(metrics(report), step=report.iteration)

    def on_train_end(self) -> None:
        """Ends the page."""
        self.run.finish()
