"""What keys demand of each other."""

import subprocess
import sys

import pytest

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.config.validate import validate


def mistake(config: RunConfig) -> str:
    with pytest.raises(ValueError) as caught:
        validate(config)
    return str(caught.value)


def test_defaults_are_valid() -> None:
    validate(RunConfig())


def test_types_of_a_config_made_in_code() -> None:
    config = RunConfig()
    config.training.train_iters = 0
    assert mistake(config) == "training.train_iters=0 must be a whole number of at least 1"


def test_keys_that_go_together() -> None:
    config = RunConfig()
    config.checkpoint.keep_every = 1000
    assert "checkpoint.keep_every needs checkpoint.keep" in mistake(config)
    config.checkpoint.keep = 3
    config.logging.profile_step_start = 5
    assert "go together" in mistake(config)
    config.logging.profile_step_end = 5
    assert "the second larger than the first" in mistake(config)
    config.logging.profile_step_end = 6
    validate(config)


def test_batch_sizes() -> None:
    config = RunConfig()
    config.training.global_batch_size, config.training.micro_batch_size = 6, 4
    assert mistake(config).endswith(
        "must be a multiple of training.micro_batch_size=4; try training.global_batch_size=8"
    )


def test_released_tokenizer_needs_its_weights() -> None:
    config = RunConfig()
    config.tokenizer.name = "dv8x16x16"
    assert "needs tokenizer.path" in mistake(config)
    config.tokenizer.path = "checkpoints/Cosmos-Tokenize1-DV8x16x16-720p"
    validate(config)


def test_schedule_ends_below_its_peak() -> None:
    config = RunConfig()
    config.schedule.min_lr = 0.1
    assert "schedule.min_lr=0.1 must not exceed optimizer.lr=0.001" in mistake(config)


def test_only_the_linear_schedule_cools_down() -> None:
    config = RunConfig()
    config.schedule.cooldown_iters = 100
    assert "schedule.cooldown_iters needs schedule.name=lambda_linear" in mistake(config)
    config.schedule.name = "lambda_linear"
    validate(config)


def test_overlap_of_the_parameter_gather() -> None:
    config = RunConfig()
    config.parallel.overlap_param_gather = True
    assert "parallel.overlap_grad_reduce=true" in mistake(config)
    config.parallel.overlap_grad_reduce = True
    validate(config)
    config.parallel.use_distributed_optimizer = False
    assert "parallel.use_distributed_optimizer=true" in mistake(config)


def test_resolution() -> None:
    config = RunConfig()
    config.data.height = 100
    assert mistake(config) == "data.height=100 must be a multiple of 16; try data.height=96"


def test_config_imports_no_torch() -> None:
    code = "import sys, cosmos_mcore.config, cosmos_mcore.model.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_fp8_and_recompute_need_their_partners() -> None:
    config = RunConfig()
    config.precision.fp8, config.precision.dtype = "delayed", "fp32"
    with pytest.raises(ValueError, match="precision.fp8=delayed needs precision.dtype=bf16"):
        validate(config)
    config.precision.dtype = "bf16"
    config.parallel.recompute_num_layers = 2
    with pytest.raises(ValueError, match="recompute_num_layers needs parallel.recompute_granularity=full"):
        validate(config)
    config.parallel.recompute_granularity = "full"
    validate(config)


def test_only_the_released_tokenizer_has_files_to_run() -> None:
    config = RunConfig()
    config.tokenizer.engine = "jit"
    with pytest.raises(ValueError, match=r"tokenizer\.engine=jit needs tokenizer\.name=dv8x16x16"):
        validate(config)
    config.tokenizer.name, config.tokenizer.path = "dv8x16x16", "folder"
    validate(config)


def test_weights_are_as_many_as_paths() -> None:
    config = RunConfig()
    config.data.path, config.data.weights = ["a", "b"], [1.0]
    with pytest.raises(ValueError, match=r"data\.weights has 1 numbers, data\.path 2 entries"):
        validate(config)
    config.data.weights = [1.0, 0.5]
    validate(config)


def test_clips_are_generated_by_ranks_with_all_weights_and_something_to_continue() -> None:
    config = RunConfig()
    config.logging.sample_interval = 100
    validate(config)
    config.parallel.pipeline_model_parallel_size = 2
    assert "logging.sample_interval needs parallel.pipeline_model_parallel_size=1" in mistake(config)
    config.parallel.pipeline_model_parallel_size = 1
    config.data.num_frames, config.model.num_condition_latents = 1, 0
    assert "nothing to continue in an image" in mistake(config)
