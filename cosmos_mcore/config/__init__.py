"""The run's config: its schema, strict loading, checks and the numbers that follow from it. Imports no torch."""

from cosmos_mcore.config.derived import (
    VideoLayout,
    data_parallel_size,
    derive_video_layout,
    num_microbatches,
    run_dir,
)
from cosmos_mcore.config.load import load_config, to_yaml
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.config.validate import validate

__all__ = [
    "RunConfig",
    "VideoLayout",
    "data_parallel_size",
    "derive_video_layout",
    "load_config",
    "num_microbatches",
    "run_dir",
    "to_yaml",
    "validate",
]
