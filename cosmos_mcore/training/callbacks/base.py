"""What callbacks are told. They live on rank 0 only and must not communicate."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cosmos_mcore.data.index import SkippedFile
from cosmos_mcore.training.token_stats import Stats


@dataclass
class StepReport:
    """One logged iteration.

    Attributes:
        iteration: optimizer steps done, this one included.
        train_iters: steps of the whole run.
        consumed_samples: clips seen by all replicas since the start of the run.
        lm_loss: mean cross entropy over the global batch.
        z_loss: mean z-loss, coefficient included.
        grad_norm: norm of the whole gradient before clipping.
        learning_rate: rate of this step.
        global_batch_size: clips per step.
        step_seconds: wall time per iteration since the last report.
        data_seconds: part of it that the step waited for clips.
        tokens_per_second: tokens per second and process.
        tflops: useful TFLOP/s per process (``training/flops.py``).
        skipped_iterations: steps left out by the optimizer since the start of this process.
        nan_iterations: steps with a loss or gradient that is not finite since the start of this process.
        skipped_files: files found unusable since the last report.
        resumed_from: iteration of the checkpoint this process started from, in its first report only.
        mfu: ``tflops`` as part of what the GPU can do in bf16; None where that is not known.
        memory_gib: of rank 0: the most so far on the GPU; where there is none, what the process has now.
        token_accuracy: part of the tokens whose most likely prediction is right, in this step; None: not measured.
        frame_losses: mean cross entropy of each latent frame that is learnt, since the last report.
        validation: the same numbers on videos that are not trained on, where they were measured after this step.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    lm_loss: float
    z_loss: float
    grad_norm: float
    learning_rate: float
    global_batch_size: int
    step_seconds: float
    data_seconds: float
    tokens_per_second: float
    tflops: float
    skipped_iterations: int
    nan_iterations: int
    skipped_files: list[SkippedFile] = field(default_factory=list)
    resumed_from: int | None = None
    mfu: float | None = None
    memory_gib: float = 0.0
    token_accuracy: float | None = None
    frame_losses: list[float] = field(default_factory=list)
    validation: Stats | None = None


class Callback:
    """Base of all callbacks: does nothing."""

    def on_train_start(self, iteration: int) -> None:
        """Before the first step; ``iteration`` steps are done already."""

    def on_report(self, report: StepReport) -> None:
        """After every ``logging.log_interval``-th step."""

    def on_save(self, iteration: int, path: Path) -> None:
        """After a checkpoint is complete on disk."""

    def on_sample(self, iteration: int, strip: Path) -> None:
        """After a generated clip of ``logging.sample_interval`` is written; ``strip`` is a PNG. In a thread."""

    def on_train_end(self) -> None:
        """After the last step, and when training ends early."""
