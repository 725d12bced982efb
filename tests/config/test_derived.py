"""Derived numbers against the original's tables (spec/model.md sections 1 and 7)."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.config.derived import (
    data_parallel_size,
    derive_video_layout,
    num_microbatches,
    padding_multiple,
    run_dir,
)
from cosmos_mcore.config.schema import RunConfig


def video(num_frames: int, height: int, width: int) -> RunConfig:
    config = RunConfig()
    config.data.num_frames, config.data.height, config.data.width = num_frames, height, width
    return config


@pytest.mark.parametrize(
    ("size", "latent_shape", "num_tokens", "ignored", "kept", "z_positions"),
    [
        ((33, 384, 640), (5, 24, 40), 4800, 959, 3840, 4799),
        ((33, 640, 848), (5, 40, 53), 10600, 2119, 8480, 10599),
        ((33, 640, 1024), (5, 40, 64), 12800, 2559, 10240, 12799),
    ],
)
def test_original_configurations(
    size: tuple[int, int, int],
    latent_shape: tuple[int, int, int],
    num_tokens: int,
    ignored: int,
    kept: int,
    z_positions: int,
) -> None:
    layout = derive_video_layout(video(*size))
    assert layout.latent_shape == latent_shape
    assert layout.num_tokens == layout.sequence_length == layout.padded_sequence_length == num_tokens
    assert layout.num_ignored_tokens == ignored
    assert layout.num_loss_positions == kept
    assert layout.num_z_loss_positions == z_positions


def test_begin_of_video_token() -> None:
    layout = derive_video_layout(video(33, 640, 1024), begin_of_video=True)
    assert (layout.num_tokens, layout.sequence_length) == (12800, 12801)
    assert (layout.num_ignored_tokens, layout.num_loss_positions) == (2560, 10240)


def test_images() -> None:
    config = video(1, 64, 96)
    config.model.num_condition_latents = 0
    layout = derive_video_layout(config)
    assert layout.latent_shape == (1, 4, 6)
    assert (layout.num_ignored_tokens, layout.num_loss_positions) == (0, 23)  # the first token is nowhere predicted
    assert derive_video_layout(config, begin_of_video=True).num_loss_positions == 24


def test_chunks() -> None:
    assert derive_video_layout(video(66, 64, 64)).latent_shape == (10, 4, 4)
    assert derive_video_layout(video(165, 64, 64)).latent_shape == (25, 4, 4)
    assert derive_video_layout(video(17, 64, 64)).latent_shape == (3, 4, 4)  # one chunk of all frames
    config = video(34, 64, 64)
    config.tokenizer.pixel_chunk_duration = 17
    assert derive_video_layout(config).latent_shape == (6, 4, 4)


@given(
    chunk=st.integers(1, 8).map(lambda latents: 8 * latents + 1),
    chunks=st.integers(1, 4),
    height=st.integers(1, 8),
    width=st.integers(1, 8),
    given_latents=st.integers(1, 2),
    begin_of_video=st.booleans(),
    layout=st.sampled_from([(1, False, 1), (4, False, 1), (4, True, 1), (1, False, 2), (2, True, 4)]),
)
def test_what_holds_for_every_layout(
    chunk: int,
    chunks: int,
    height: int,
    width: int,
    given_latents: int,
    begin_of_video: bool,
    layout: tuple[int, bool, int],
) -> None:
    config = video(chunk * chunks, 16 * height, 16 * width)
    config.tokenizer.pixel_chunk_duration = chunk
    config.model.num_condition_latents = given_latents
    parallel = config.parallel
    parallel.tensor_model_parallel_size, parallel.sequence_parallel, parallel.context_parallel_size = layout
    if given_latents >= ((chunk - 1) // 8 + 1) * chunks:
        with pytest.raises(ValueError, match="num_condition_latents"):
            derive_video_layout(config, begin_of_video)
        return
    derived = derive_video_layout(config, begin_of_video)
    frames, rows, columns = derived.latent_shape
    # Every generated video token is scored exactly once, conditioning tokens never.
    assert derived.num_loss_positions == (frames - given_latents) * rows * columns
    assert (
        derived.sequence_length <= derived.padded_sequence_length < derived.sequence_length + padding_multiple(config)
    )
    assert derived.padded_sequence_length % padding_multiple(config) == 0


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((33, 100, 64), "data.height=100 must be a multiple of 16; try data.height=96"),
        ((33, 64, 3), "data.width=3 must be a multiple of 16; try data.width=16"),
        ((40, 64, 64), "data.num_frames=40 must be 1 \\+ a multiple of 8; try data.num_frames=33"),
        ((1, 64, 64), "model.num_condition_latents=1 must be less than the 1 latent frames"),
        ((0, 64, 64), "data.num_frames=0 must be"),
    ],
)
def test_sizes_that_do_not_fit(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        derive_video_layout(video(*size))


def test_chunk_that_does_not_fit() -> None:
    config = video(33, 64, 64)
    config.tokenizer.pixel_chunk_duration = 17
    with pytest.raises(ValueError, match="multiple of the tokenizer's chunk of 17 frames"):
        derive_video_layout(config)
    config.tokenizer.pixel_chunk_duration = 16
    with pytest.raises(ValueError, match="try tokenizer.pixel_chunk_duration=9"):
        derive_video_layout(config)


def test_batch_over_replicas() -> None:
    config = RunConfig()
    parallel, training = config.parallel, config.training
    parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size = 2, 2, 2
    training.global_batch_size, training.micro_batch_size = 12, 2
    assert data_parallel_size(config, world_size=24) == 3
    assert num_microbatches(config, world_size=24) == 2


def test_run_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig()
    config.job.name = "n"
    monkeypatch.delenv("OUTPUT_ROOT", raising=False)
    assert run_dir(config) == Path("checkpoints/posttraining/autoregressive_base/n")
    monkeypatch.setenv("OUTPUT_ROOT", "")
    assert run_dir(config) == Path("checkpoints/posttraining/autoregressive_base/n")
    monkeypatch.setenv("OUTPUT_ROOT", "/out")
    assert run_dir(config) == Path("/out/posttraining/autoregressive_base/n")


def test_padding_for_fp8_and_context_parallelism() -> None:
    config = RunConfig()  # 33 x 640 x 848: 10,600 tokens
    assert derive_video_layout(config).padded_sequence_length == 10600
    config.precision.fp8 = "delayed"
    assert derive_video_layout(config).padded_sequence_length == 10624
    config.parallel.tensor_model_parallel_size, config.parallel.sequence_parallel = 4, True
    assert derive_video_layout(config).padded_sequence_length == 10624
    config.parallel.context_parallel_size = 2
    assert derive_video_layout(config).padded_sequence_length % (2 * 2 * 4 * 32) == 0
    config.precision.fp8 = None
    assert derive_video_layout(config).padded_sequence_length == 10608
