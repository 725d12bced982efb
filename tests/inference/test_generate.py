"""Generation with the KV cache, on one process and with the model split over two."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def results(request, tmp_path_factory):
    """What every rank of a run over ``request.param`` processes saved."""
    folder = tmp_path_factory.mktemp(f"tp{request.param}")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={request.param}"]
    command += ["-m", "tests.inference.generation_worker", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert process.returncode == 0, process.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


def test_cached_greedy_equals_argmax_of_full_forwards(results, golden_dir):
    case = torch.load(golden_dir / "base.pt", weights_only=True)
    tokens, given = results[0]["tokens"], results[0]["tokens"]["prompt_length"]
    assert torch.equal(tokens["greedy"][:, :given], case["tokens"][:, :given])
    assert torch.equal(tokens["greedy"][:, given:], tokens["logits"][:, given - 1 : -1].argmax(-1))
    assert torch.allclose(tokens["logits"][:, :given], case["logits"][:, :given], rtol=0, atol=2e-4)
    assert tokens["greedy"][:, given:].unique().numel() > 5


def test_every_rank_has_the_same_ids(results):
    for other in results[1:]:
        assert torch.equal(other["tokens"]["sampled"], results[0]["tokens"]["sampled"])
        assert torch.equal(other["videos"]["nine"]["ids"], results[0]["videos"]["nine"]["ids"])


def test_a_continuation_keeps_what_was_given_and_fills_the_clip(results):
    videos = results[0]["videos"]
    for name, frames, latents in (("one", 1, 1), ("nine", 9, 2)):
        made = videos[name]
        assert made["num_given"] == frames
        assert made["ids"].shape == (4, 2, 3)
        assert made["video"].shape == (3, 25, 32, 48)
        assert torch.equal(made["ids"][:latents], videos["clip_ids"][:latents].long())
        assert not torch.equal(made["ids"][latents:], videos["clip_ids"][latents:].long())
    assert torch.equal(videos["nine_other"]["video"], videos["decoded"])


def test_the_seed_alone_decides(results):
    videos = results[0]["videos"]
    assert torch.equal(videos["nine"]["ids"], videos["nine_again"]["ids"])
    assert not torch.equal(videos["nine"]["ids"], videos["nine_other"]["ids"])


def test_what_does_not_fit_is_refused(results):
    assert "are more than the model's 72 positions" in results[0]["tokens"]["too_long"]
    assert "pipeline_model_parallel_size=1" in results[0]["tokens"]["staged"]
    frames, whole_clip, size = results[0]["videos"]["bad"]
    assert "8 given frames do not fit" in frames
    assert "25 given frames do not fit" in whole_clip
    assert "16x48, but the model makes clips of 32x48" in size
