"""Videos and prompts on GPUs: T5 in bf16 against float32, training in bf16 on one GPU, and the same on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cosmos_mcore.data import embed_prompts
from cosmos_mcore.text.encoder import TextEncoder
from tests.text.models import write_tiny_t5
from tests.videos import write_test_clip

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS = 20
SMALL = [
    "model.num_layers=4", "model.hidden_size=512", "model.ffn_hidden_size=1024", "model.num_attention_heads=8",
    "model.num_query_groups=4", "model.kv_channels=64", "tokenizer.name=haar", "tokenizer.path=null",
    "data.height=64", "data.width=96", "data.num_frames=17", "data.start_frame_interval=3", "checkpoint.load=null",
    "optimizer.lr=3e-4", "schedule.warmup_iters=2", f"training.train_iters={STEPS}", "training.global_batch_size=4",
    "training.micro_batch_size=2", "precision.main_grads=fp32", "logging.tensorboard=false",
    "logging.progress_bar=false", f"checkpoint.save_interval={STEPS}", "parallel.tensor_model_parallel_size=1",
    "parallel.sequence_parallel=false",
]  # fmt: skip
PROMPTS = ("a robot arm lifts a box", "the car turns left", "rain", "sun")
LAYOUTS = {
    "TP2+SP": ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"),
    "PP2": ("parallel.pipeline_model_parallel_size=2",),
    "CP2": ("parallel.context_parallel_size=2",),
    "DP2": (),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a run on four videos whose prompts are embedded."""
    folder = tmp_path_factory.mktemp("video2world")
    for number, prompt in enumerate(PROMPTS):
        write_test_clip(folder / f"{number}.mp4", 24, height=64, width=96)
        (folder / f"{number}.txt").write_text(prompt)
    command = [
        str(ROOT / "conf/video2world_5b.yaml"),
        *SMALL,
        f"data.path={folder}",
        f"data.prompt_cache={folder}/cache",
    ]
    assert embed_prompts.main([*command, "--text_encoder", str(write_tiny_t5(folder / "t5"))]) == 0
    return command


def losses(run: list[str], processes: int, root: Path, *changes: str) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "examples/pretrain_cosmos_ar.py", *run, *changes]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OUTPUT_ROOT": str(root)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = root.rglob("metrics.jsonl")
    return [json.loads(line)["lm loss"] for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def one_gpu(run: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return losses(run, 1, tmp_path_factory.mktemp("one"))


def test_the_encoder_in_bf16_on_a_gpu(tmp_path: Path) -> None:
    folder = write_tiny_t5(tmp_path)
    exact = TextEncoder.from_folder(folder, torch.device("cpu"), torch.float32)(PROMPTS)
    found = TextEncoder.from_folder(folder, torch.device("cuda"))(PROMPTS)
    assert found.is_cuda and found.dtype == torch.bfloat16
    assert (found.cpu().float() - exact).norm() < 0.03 * exact.norm()


def test_one_gpu_learns(one_gpu: list[float]) -> None:
    assert len(one_gpu) == STEPS and one_gpu[-1] < one_gpu[0] - 0.5


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_gpus_agree_with_one(name: str, run: list[str], one_gpu: list[float], tmp_path: Path) -> None:
    assert losses(run, 2, tmp_path, *LAYOUTS[name]) == pytest.approx(one_gpu, rel=1e-2)
