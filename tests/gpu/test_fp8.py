"""FP8 training on one GPU: resume bit for bit, change of precision on resume, no wait for the device in a step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from cosmos_mcore.config import derive_video_layout, load_config
from cosmos_mcore.config.derived import TEXT_LENGTH
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel import initialize as groups
from cosmos_mcore.training.main import main
from cosmos_mcore.training.setup import build_trainable
from cosmos_mcore.training.step import LossPositions, train_step
from tests.videos import write_test_clip

pytestmark = pytest.mark.gpu

SMALL = [
    "model.num_layers=2", "model.hidden_size=512", "model.ffn_hidden_size=1024", "model.num_attention_heads=8",
    "model.num_query_groups=4", "model.kv_channels=64", "tokenizer.name=haar", "tokenizer.path=null",
    "data.height=64", "data.width=96", "data.num_frames=17", "checkpoint.load=null", "schedule.warmup_iters=2",
    "schedule.decay_iters=8", "logging.tensorboard=false", "logging.progress_bar=false",
]  # fmt: skip
CONFIG = str(Path(__file__).parents[2] / "conf/teal_tp1.yaml")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for number in range(4):
        write_test_clip(folder / f"{number}.mp4", 24, height=64, width=96)
    return folder


@pytest.fixture
def train(videos, tmp_path, monkeypatch):
    """Trains one job up to some iteration and returns its metrics by iteration."""
    monkeypatch.setenv("OUTPUT_ROOT", str(tmp_path))
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # attention's backward pass else differs between runs

    def run(name, iters, *keys):
        assert main([CONFIG, *SMALL, f"data.path={videos}", f"job.name={name}", f"training.train_iters={iters}",
                     "checkpoint.save_interval=4", *keys]) == 0  # fmt: skip
        path = tmp_path / "posttraining/autoregressive_base" / name / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return {row["iteration"]: (row["lm loss"], row["grad norm"]) for row in rows}

    yield run
    groups.shut_down()


@pytest.mark.parametrize("moments", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, recipe, moments):
    keys = [f"precision.fp8={recipe}", f"precision.moments={moments}", f"precision.main_grads={moments}"]
    whole = train("whole", 8, *keys)
    train("parts", 4, *keys)
    assert train("parts", 8, *keys) == whole
    assert len(whole) == 8 and all(math.isfinite(loss) for loss, _ in whole.values())


@pytest.mark.parametrize(("first", "second"), [("null", "delayed"), ("delayed", "null"), ("delayed", "tensorwise")])
def test_precision_can_change_on_resume(train, first, second):
    reference = train("bf16", 8, "precision.fp8=null")
    train("changed", 4, f"precision.fp8={first}")
    changed = train("changed", 8, f"precision.fp8={second}")
    for iteration in range(1, 9):
        assert changed[iteration][0] == pytest.approx(reference[iteration][0], rel=5e-3)


def test_layers_at_the_ends_can_stay_bf16(train):
    losses = train("ends", 4, "precision.fp8=tensorwise", "precision.fp8_first_last_bf16=[1,0]", "model.num_layers=3")
    assert all(math.isfinite(loss) for loss, _ in losses.values())


@pytest.mark.parametrize("preset", ["4b", "5b-video2world"])
@pytest.mark.parametrize("recipe", ["null", "delayed"])
def test_a_step_never_waits_for_the_device(recipe, preset):
    config = load_config(CONFIG, [*SMALL, f"precision.fp8={recipe}", f"model.preset={preset}"])
    arch = resolve_arch(config.model)
    layout = derive_video_layout(config, arch.text_to_video)
    device = groups.initialize(config.parallel, 0)
    try:
        chunks, model, optimizer = build_trainable(config, arch, layout, device)
        for parameter in chunks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        optimizer.reload_model_params()
        positions = LossPositions(layout, arch, 1e-4, device)
        tokens = torch.randint(arch.vocab_size, (1, layout.num_tokens), device=device)
        text = None
        if arch.context_size is not None:
            text = torch.randn(1, TEXT_LENGTH, arch.context_size, dtype=torch.bfloat16, device=device)
        step = lambda: train_step(model, optimizer, positions, tokens, 1, text)  # noqa: E731
        results = [step(), step()]
        torch.cuda.set_sync_debug_mode("error")
        results += [step() for _ in range(3)]
        torch.cuda.set_sync_debug_mode("default")
        assert all(math.isfinite(result.read().loss) for result in results)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        groups.shut_down()
