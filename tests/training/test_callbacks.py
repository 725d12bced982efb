"""The log line, the metrics file, TensorBoard and the progress bar."""

import json
import logging
import math
import re
import sys
from dataclasses import replace

import pytest

from cosmos_mcore.data.index import SkippedFile
from cosmos_mcore.training.callbacks import LogLine, MetricsFile, ProgressBar, StepReport, TensorBoard, WandB
from cosmos_mcore.training.callbacks.log_line import log_line
from cosmos_mcore.training.callbacks.metrics import metrics

REPORT = StepReport(
    iteration=7,
    train_iters=50,
    consumed_samples=28,
    lm_loss=2.5,
    z_loss=0.125,
    grad_norm=1.5,
    learning_rate=1e-3,
    global_batch_size=4,
    step_seconds=0.25,
    data_seconds=0.05,
    tokens_per_second=1234.4,
    tflops=98.76,
    skipped_iterations=1,
    nan_iterations=2,
)
# What people and their scripts search Megatron's logs for.
MEGATRONS = (
    "consumed samples",
    "elapsed time per iteration (ms)",
    "throughput per GPU (TFLOP/s/GPU)",
    "learning rate",
    "global batch size",
    "lm loss",
    "grad norm",
    "number of skipped iterations",
    "number of nan iterations",
)


def test_log_line_has_megatrons_fields():
    line = log_line(REPORT)
    assert re.match(r" \[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] iteration +7/ +50 \|", line)
    fields = dict(part.strip().split(": ", 1) for part in line.split(" | ")[1:] if ": " in part)
    assert set(MEGATRONS) <= set(fields)
    assert "\n" not in line
    assert float(fields["lm loss"]) == 2.5 and float(fields["learning rate"]) == 1e-3
    assert float(fields["elapsed time per iteration (ms)"]) == 250
    assert fields["tokens/s/GPU"] == "1234" and fields["consumed samples"].strip() == "28"


def test_log_line_and_metrics_name_the_same_numbers():
    names = re.findall(r"\| ([^|:]+):", log_line(REPORT))
    assert set(names) | {"iteration"} == set(metrics(REPORT))


def test_log_line_goes_to_the_log(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr(logging.getLogger("cosmos_mcore"), "propagate", True)
    with caplog.at_level(logging.INFO, "cosmos_mcore"):
        LogLine().on_report(REPORT)
        LogLine().on_save(7, tmp_path / "iter_000000007")
    assert "lm loss: 2.5" in caplog.text and f"saved checkpoint {tmp_path / 'iter_000000007'}" in caplog.text


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_file_gets_one_object_per_report(tmp_path):
    path = tmp_path / "metrics.jsonl"
    callback = MetricsFile(path)
    callback.on_train_start(0)
    callback.on_report(REPORT)
    callback.on_report(replace(REPORT, iteration=8, resumed_from=7, skipped_files=[SkippedFile("a.mp4", "is empty")]))
    plain, other = read(path)
    assert plain["iteration"] == 7 and plain["lm loss"] == 2.5 and set(MEGATRONS) <= set(plain)
    assert "resumed from" not in plain and "skipped files" not in plain
    assert other["resumed from"] == 7
    assert other["skipped files"] == [{"path": "a.mp4", "reason": "is empty"}]


def test_a_loss_that_is_no_number_is_null(tmp_path):
    MetricsFile(tmp_path / "metrics.jsonl").on_report(replace(REPORT, lm_loss=math.nan, grad_norm=math.inf))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"lm loss": null' in text and '"grad norm": null' in text and "NaN" not in text and "Infinity" not in text


def test_metrics_file_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"iteration": i, "lm loss": 10 - i}) for i in range(1, 7)]
    path.write_text("\n".join(lines) + '\n{"iteration": 7, "lm lo')  # torn by a kill
    callback = MetricsFile(path)
    callback.on_train_start(4)
    assert read(path) == [json.loads(line) for line in lines[:4]]
    callback.on_report(replace(REPORT, iteration=5))
    assert [record["iteration"] for record in read(path)] == [1, 2, 3, 4, 5]
    MetricsFile(path).on_train_start(0)
    assert read(path) == []
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_points(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 8):
        callback = TensorBoard(tmp_path)
        callback.on_train_start(start)
        for iteration in range(start + 1, start + 11):
            callback.on_report(replace(REPORT, iteration=iteration, lm_loss=float(iteration + start)))
        callback.on_train_end()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("lm loss")]
    assert points == [(i, i) for i in range(1, 9)] + [(i, i + 8) for i in range(9, 19)]


def test_tensorboard_that_was_never_opened_can_be_closed(tmp_path):
    TensorBoard(tmp_path).on_train_end()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_is_drawn_on_a_terminal_only(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    bar = ProgressBar(50)
    bar.on_train_start(6)
    bar.on_report(REPORT)
    bar.on_train_end()
    drawn = capsys.readouterr().err
    assert ("7/50" in drawn and "loss=2.500" in drawn) if terminal else drawn == ""


def test_wandb_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install"):
        WandB("project", "name", {})
