"""The checks of a parallel layout: what works, and one sentence for what does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.config import RunConfig
from cosmos_mcore.config.schema import ParallelConfig
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.parallel.layout import (
    check_layout,
    check_num_microbatches,
    check_world_size,
    model_parallel_size,
    pipeline_split,
    stage_layers,
)

SIZES = ("num_layers", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")


def made(*, global_batch_size=8, micro_batch_size=1, **parallel):
    config = RunConfig()
    config.training.global_batch_size, config.training.micro_batch_size = global_batch_size, micro_batch_size
    for key, value in parallel.items():
        assert hasattr(config.parallel, key)
        setattr(config.parallel, key, value)
    return config


def check(preset, **parallel):
    arch = PRESETS[preset]
    check_layout(made(**parallel), **{name: getattr(arch, name) for name in SIZES})


def message(function, *arguments, **keywords):
    with pytest.raises(ValueError) as caught:
        function(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_model_parallel_size():
    config = made(tensor_model_parallel_size=2, pipeline_model_parallel_size=3, context_parallel_size=5)
    assert model_parallel_size(config) == 30


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tp", [1, 2])
def test_every_model_can_be_cut_in_two(preset, tp):
    check(preset, tensor_model_parallel_size=tp, pipeline_model_parallel_size=2, sequence_parallel=tp > 1)


def test_large_models_over_eight_ranks():
    for preset in ("4b", "12b", "13b-video2world"):
        check(preset, tensor_model_parallel_size=8, sequence_parallel=True)
        check(preset, pipeline_model_parallel_size=8)
    check("12b", pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=5)


@pytest.mark.parametrize(
    ("preset", "parallel", "parts"),
    [
        ("4b", {"tensor_model_parallel_size": 16}, ("tensor_model_parallel_size=16", "8 query groups", "try 8")),
        ("4b", {"tensor_model_parallel_size": 3}, ("tensor_model_parallel_size=3", "try 2")),
        ("tiny", {"tensor_model_parallel_size": 4}, ("2 query groups", "try 2")),
        ("tiny", {"tensor_model_parallel_size": 10**20}, ("2 query groups", "try 2")),  # at once, too
        ("tiny", {"pipeline_model_parallel_size": 10**20}, ("try", "=5 without")),
        ("4b", {"sequence_parallel": True}, ("sequence_parallel", "set it to false")),
        ("tiny", {"pipeline_model_parallel_size": 7}, ("pipeline_model_parallel_size=7", "try", "=5 without")),
        ("4b", {"virtual_pipeline_model_parallel_size": 2}, ("virtual_pipeline_model_parallel_size", "at least 2")),
        (
            "tiny",
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 3},
            ("virtual_pipeline_model_parallel_size=3", "4 layers", "virtual_pipeline_model_parallel_size=2"),
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_with_something_to_try(preset, parallel, parts):
    text = message(check, preset, **parallel)
    for part in parts:
        assert part in text


@given(st.integers(1, 40), st.integers(1, 64))
def test_a_proposed_tensor_parallel_size_works(groups, tp):
    sizes = {"num_attention_heads": groups * 4, "num_query_groups": groups, "ffn_hidden_size": 960, "vocab_size": 64000}
    try:
        check_layout(made(tensor_model_parallel_size=tp), num_layers=4, **sizes)
    except ValueError as error:
        proposed = int(str(error).rpartition("try ")[2])
        assert proposed < tp
        check_layout(made(tensor_model_parallel_size=proposed), num_layers=4, **sizes)


@given(st.integers(1, 48), st.integers(2, 60), st.sampled_from([None, 2, 3]))
def test_a_proposed_pipeline_size_works(layers, pp, vpp):
    try:
        pipeline_split(
            ParallelConfig(pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=vpp), layers
        )
    except ValueError as error:
        proposed = int(str(error).partition("try pipeline_model_parallel_size=")[2].split()[0])
        pipeline_split(ParallelConfig(pipeline_model_parallel_size=proposed), layers)


@pytest.mark.parametrize(
    ("layers", "pp", "vpp", "first", "last", "expected"),
    [
        (16, 1, None, None, None, [[16]]),
        (16, 4, 2, None, None, [[2, 2]] * 4),
        (16, 3, None, None, None, [[5], [6], [5]]),  # embedding and head count as a layer each
        (15, 2, 4, None, None, [[2, 2, 2, 2], [2, 2, 2, 1]]),  # the head does
        (16, 4, None, 1, None, [[1], [5], [5], [5]]),
        (16, 2, 2, 6, 10, [[3, 3], [5, 5]]),
    ],
)
def test_layers_of_each_stage(layers, pp, vpp, first, last, expected):
    parallel = ParallelConfig(
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    assert stage_layers(parallel, layers) == expected


def test_processes_must_hold_whole_replicas_that_share_the_batch():
    check_world_size(made(tensor_model_parallel_size=2), 16)
    assert "multiple of 6 processes, but there are 8" in message(
        check_world_size, made(tensor_model_parallel_size=3, context_parallel_size=2), 8
    )
    text = message(check_world_size, made(tensor_model_parallel_size=2, global_batch_size=6, micro_batch_size=2), 8)
    assert (
        "global_batch_size=6 must be a multiple of micro_batch_size=2 x 4 data-parallel replicas (8 processes)" in text
    )
    assert "try training.global_batch_size=8" in text


def test_interleaved_pipelines_need_rounds_of_micro_batches():
    config = made(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    check_num_microbatches(config, 8)
    assert "there are 6 per step" in message(check_num_microbatches, config, 6)
    check_num_microbatches(made(pipeline_model_parallel_size=4), 6)
