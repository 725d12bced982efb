"""Clips generated during training on a GPU: a CUDA graph between the steps, and no trace in the losses."""

import json

import pytest
from PIL import Image

from tests.processes import run_ranks
from tests.videos import write_test_clip

pytestmark = pytest.mark.gpu

# Four layers of a quarter of the 4B's width, in bf16: each of the two runs saves 2 GB.
CONFIG = """
job: {{project: tests, group: small, name: run}}
model:
  preset: 4b
  num_layers: 4
  hidden_size: 1024
  ffn_hidden_size: 3584
  num_attention_heads: 8
  num_query_groups: 2
data: {{path: {clips}, height: 96, width: 160, num_frames: 17, token_cache: null, decoder: pyav}}
schedule: {{warmup_iters: 2, decay_iters: 12}}
optimizer: {{lr: 1.0e-4}}
training: {{train_iters: 6, global_batch_size: 2, micro_batch_size: 1}}
checkpoint: {{save_interval: 1000}}
"""


def test_training_does_not_notice(tmp_path, monkeypatch):
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")  # else attention adds in another order each time
    write_test_clip(tmp_path / "clips" / "0.mp4", 40, 96, 160)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(clips=tmp_path / "clips"))
    run_ranks("tests.training.samples_worker", 1, tmp_path, config, "one", timeout=280)
    curves = []
    for switch in ("on", "off"):
        run = tmp_path / "one" / switch / "tests" / "small" / "run"
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curves.append([number for record in records for number in (record["lm loss"], record["grad norm"])])
    assert len(curves[0]) == 12 and curves[0] == pytest.approx(curves[1], rel=1e-4)
    samples = tmp_path / "one" / "on" / "tests" / "small" / "run" / "samples"
    assert len(list(samples.glob("*.mp4"))) == 3
    assert Image.open(samples / "iter_000000006_strip.png").width > 500
