"""Everything that watches a run: the log line, the progress bar, the metrics file, TensorBoard."""

from cosmos_mcore.training.callbacks.base import Callback, StepReport
from cosmos_mcore.training.callbacks.log_line import LogLine, ProgressBar
from cosmos_mcore.training.callbacks.metrics import MetricsFile, TensorBoard, WandB

__all__ = ["Callback", "LogLine", "MetricsFile", "ProgressBar", "StepReport", "TensorBoard", "WandB"]
