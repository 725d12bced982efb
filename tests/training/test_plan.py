"""Estimates of memory and time against what GPUs have shown, and the choice of layouts."""

import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_mcore.config import load_config
from cosmos_mcore.config.derived import derive_video_layout
from cosmos_mcore.model.presets import check_run_layout, resolve_arch
from cosmos_mcore.training.plan import (
    clip_of_tokens,
    estimate_memory,
    estimate_step_seconds,
    keys_that_save_memory,
    parse_gpus,
    plans,
    table,
)

ROOT = Path(__file__).parents[2]
LEAN = ["precision.main_grads=bf16", "precision.moments=bf16"]
TWO_CLIPS = ["training.global_batch_size=2", "training.micro_batch_size=2"]
LARGE = ["data.height=640", "data.width=848"]
TP2 = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]

# Peak GB and ms per step from the cards in docs/cards (train_step_*.yaml).
MEASURED = {
    "fp8, 4,800 tokens": (["precision.fp8=delayed"], 1, 59.05, 175.9),
    "fp8, 2 x 4,800 tokens": (["precision.fp8=delayed", *TWO_CLIPS], 1, 69.94, 312.4),
    "fp8, 10,624 tokens": (["precision.fp8=delayed", *LARGE], 1, 72.24, 397.9),
    "bf16, 2 x 4,800 tokens": (TWO_CLIPS, 1, 65.80, 434.7),
    "fp8, 10,624 tokens, TP2": (["precision.fp8=delayed", *LARGE, *TP2], 2, 36.32, 220.8),
    "12b, fp8, recomputed": (
        ["precision.fp8=delayed", "model.preset=12b", "data.height=640", "data.width=1024",
         "parallel.recompute_granularity=full"], 1, 124.73, 1719.7,
    ),
}  # fmt: skip


def config(*keys):
    return load_config(ROOT / "conf/teal_tp1.yaml", [*LEAN, *keys])


@pytest.mark.parametrize("case", MEASURED)
def test_estimates_are_what_gpus_have_shown(case):
    keys, gpus, gigabytes, milliseconds = MEASURED[case]
    memory = estimate_memory(config(*keys), gpus)
    assert memory.peak / 1e9 == pytest.approx(gigabytes, rel=0.05)
    assert memory.needed > memory.peak
    assert estimate_step_seconds(config(*keys), gpus) * 1e3 == pytest.approx(milliseconds, rel=0.1)


# Peak GB of layouts_4b_width_2xh200.yaml: four layers, four clips, micro-batches of one, all states in float32.
TWO_GPUS = {
    "TP2": (TP2[:1], 13.9),
    "TP2+SP": (TP2, 13.6),
    "PP2": (["parallel.pipeline_model_parallel_size=2"], 15.1),
    "PP2 VPP2": (
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
        16.0,
    ),
    "CP2": (["parallel.context_parallel_size=2"], 18.5),
    "DP2": (["parallel.use_distributed_optimizer=false"], 30.0),
    "DP2 distributed optimizer": ([], 20.3),
}


@pytest.mark.parametrize("layout", TWO_GPUS)
def test_memory_of_layouts_on_two_gpus(layout):
    keys, gigabytes = TWO_GPUS[layout]
    states = ["precision.main_grads=fp32", "precision.moments=fp32"]
    run = config("model.num_layers=4", *states, "training.global_batch_size=4", *keys)
    assert estimate_memory(run, 2).peak / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_plans_fit_and_come_fastest_first():
    found = plans(config("model.preset=12b", "precision.fp8=delayed", "training.global_batch_size=32"), 8, 80 * 2**30)
    assert len(found) > 5
    assert [plan.seconds for plan in found] == sorted(plan.seconds for plan in found)
    assert all(plan.memory.needed <= 80 * 2**30 for plan in found)
    assert not plans(config("model.preset=12b", "precision.fp8=delayed"), 1, 80 * 2**30)
    with pytest.raises(ValueError, match="global_batch_size=4 must be a multiple .* try training.global_batch_size=7"):
        plans(config("training.global_batch_size=4"), 7, 80 * 2**30)


def test_more_gpus_per_replica_hold_less():
    peaks = []
    for size in (1, 2, 4, 8):
        run = config(f"parallel.tensor_model_parallel_size={size}")
        run.parallel.sequence_parallel = size > 1
        peaks.append(estimate_memory(run, size).peak)
    assert peaks == sorted(peaks, reverse=True)


def test_keys_that_save_memory_name_what_is_not_set_yet():
    plain = load_config(ROOT / "conf/teal_tp1.yaml", ["precision.main_grads=fp32", "precision.moments=fp32"])
    assert keys_that_save_memory(plain, 1)[0].startswith("precision.moments=bf16 (about 16 GB less)")
    lean = keys_that_save_memory(config("parallel.recompute_granularity=full"), 1)
    assert lean == ["a larger parallel.tensor_model_parallel_size with parallel.sequence_parallel=true, on more GPUs"]


def keys_named(*keys, world_size=1):
    lines = keys_that_save_memory(load_config(ROOT / "conf/teal_tp1.yaml", keys), world_size)
    return {line.split(" ")[0] for line in lines[:-1]}


def test_keys_that_save_memory_are_keys_that_this_run_may_have():
    assert keys_named("precision.dtype=fp32", "precision.main_grads=fp32") == {"parallel.recompute_granularity=full"}
    alone = keys_named("parallel.use_distributed_optimizer=false", "precision.main_grads=fp32")
    assert alone == {"parallel.recompute_granularity=full", "parallel.use_distributed_optimizer=true"}
    some = ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=4", "precision.moments=bf16"]
    assert keys_named(*some) == {"parallel.recompute_num_layers=null"}
    cut = [*some[::2], "parallel.tensor_model_parallel_size=2", *TWO_CLIPS]
    assert keys_named(*cut, world_size=2) == {"parallel.sequence_parallel=true", "training.micro_batch_size=1"}


PP2 = ["parallel.pipeline_model_parallel_size=2", "training.global_batch_size=8"]
VPP2 = [*PP2, "parallel.virtual_pipeline_model_parallel_size=2"]
SOME = ["parallel.recompute_granularity=full", "parallel.recompute_num_layers=4"]


def test_layers_are_recomputed_in_every_chunk_of_a_stage():
    """Megatron recomputes the first so many layers of each virtual stage, so four of each chunk of four are all."""
    everything = estimate_memory(config(*VPP2, SOME[0]), 2)
    assert estimate_memory(config(*VPP2, *SOME), 2) == everything
    assert estimate_memory(config(*PP2, *SOME), 2).activations > 2 * everything.activations


def test_the_fullest_stage_counts():
    """With one micro-batch there is nothing in flight, and the last stage has logits, too."""
    one = estimate_memory(config(PP2[0]), 2)
    assert one.logits == pytest.approx(4800 * 64000 * 2)
    assert one.weights == pytest.approx(2 * (8 * 218_103_808 + 4096 * 64000))
    assert estimate_memory(config(*PP2), 2).logits == 0  # the first stage has two micro-batches in flight
    uneven = config(PP2[0], "parallel.num_layers_in_first_pipeline_stage=12")
    assert estimate_memory(uneven, 2).weights == pytest.approx(2 * (12 * 218_103_808 + 4096 * 64000))


def test_a_larger_micro_batch_is_faster_than_more_of_them():
    found = plans(config("precision.fp8=delayed", "training.global_batch_size=4"), 1, 141 * 2**30)
    assert found[0].config.training.micro_batch_size == 4
    small = plans(config("precision.fp8=delayed", "training.global_batch_size=4"), 1, 70 * 2**30)
    assert small[0].config.training.micro_batch_size < 4
    layouts = [str(plan.config.parallel) for plan in found]
    assert len(layouts) == len(set(layouts))


def test_a_plan_is_a_config_that_runs():
    """Whatever layout the config had before, what is printed as the fastest one can be put behind its name."""
    given = config(*VPP2, *SOME)
    found = plans(given, 4, 80 * 2**30)
    line = next(line for line in table(given, found, 4, 80 * 2**30, 1).splitlines() if line.startswith("fastest: "))
    run = config(*VPP2, *SOME, *line.removeprefix("fastest: ").split())
    check_run_layout(run, resolve_arch(run.model), 4)
    assert run.parallel == found[0].config.parallel


@pytest.mark.parametrize(("tokens", "frames"), [(1000, 33), (4800, 33), (10600, 33), (12800, 33), (4800, 9)])
def test_a_clip_of_about_so_many_tokens(tokens, frames):
    run = config(f"data.num_frames={frames}")
    run.data.height, run.data.width = clip_of_tokens(tokens, (frames - 1) // 8 + 1)
    assert derive_video_layout(run).sequence_length == pytest.approx(tokens, rel=0.1)


def test_gpus():
    assert parse_gpus("8x80G") == (8, 80 * 2**30)
    with pytest.raises(ValueError, match="--tokens=4 must be at least 5"):
        clip_of_tokens(4, 5)
    with pytest.raises(ValueError, match="--top=0 must be at least 1"):
        table(config(), [], 1, 1.0, 0)
    with pytest.raises(ValueError, match="--gpus=80G must be a count and the memory of each GPU, for example 8x80G"):
        parse_gpus("80G")


def test_command():
    command = [sys.executable, ROOT / "scripts/plan.py", "--gpus", "4x80G", "--model", "4b", "--tokens", "10600"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and not result.stderr
    assert "fastest: parallel.tensor_model_parallel_size=" in result.stdout
    result = subprocess.run([*command[:5], "5b"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "error: model.preset=5b is unknown" in result.stderr
