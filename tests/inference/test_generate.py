"""Generation with the KV cache against Megatron's forward pass and the original's numbers, on one and two processes."""

import pytest
import torch

from tests.processes import run_ranks

MODELS = ("base", "yarn", "video2world")


@pytest.fixture(scope="module", params=[1, 2], ids=["tp1", "tp2"])
def results(request, tmp_path_factory):
    """What every rank of a run over ``request.param`` processes saved."""
    folder = tmp_path_factory.mktemp(f"tp{request.param}")
    run_ranks("tests.inference.generation_worker", request.param, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", MODELS)
def test_cached_greedy_equals_argmax_of_full_forwards(results, golden_dir, name):
    case = torch.load(golden_dir / f"{name}.pt", weights_only=True)
    for batch in (1, 3):
        made = results[0][name][f"greedy {batch}"]
        given = made["ids"].size(1) - made["new"]
        assert torch.equal(made["ids"][:2, :given], case["tokens"][:batch, :given])
        assert torch.equal(made["ids"][:, given:], made["logits"][:, given - 1 : -1].argmax(-1))
        assert made["ids"][:, given:].unique().numel() > 5
        assert torch.allclose(made["logits"][0, :given], case["logits"][0, :given], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_the_original_s(results, golden_dir, name):
    case = torch.load(golden_dir / f"{name}.pt", weights_only=True)
    cached = results[0][name]["cached logits"]
    assert torch.allclose(cached, case["logits"][:, -cached.size(1) :], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_row_s_ids_do_not_depend_on_the_batch(results, name):
    made = results[0][name]
    assert torch.equal(made["drawn alone"][0], made["drawn"][1])
    assert not torch.equal(made["drawn"][0, 24:], made["drawn"][2, 24:]), "equal prompts, other seeds"


def test_every_rank_has_the_same_ids(results):
    for other in results[1:]:
        for name in MODELS:
            assert torch.equal(other[name]["drawn"], results[0][name]["drawn"])


def test_a_video_with_a_prompt(results):
    made = results[0]["with prompts"]
    ids = made["ids"].flatten(1)
    assert torch.equal(ids[:, 12:], made["choices"]), "what Megatron's pass finds most likely"
    assert torch.equal(ids[0], ids[2]), "equal frames, equal prompts"
    assert torch.equal(ids[0, :12], ids[1, :12])
    assert not torch.equal(ids[0, 12:], ids[1, 12:]), "another prompt"
    assert "needs text embeddings" in made["without text"]


def test_what_does_not_fit_is_refused(results):
    base = results[0]["base"]
    assert "24 given and 49 new tokens are more than the model's 72 positions" in base["too long"]
    assert "made for 1 sequences, not 3" in base["other batch"]
    assert "pipeline_model_parallel_size=1" in base["staged"]
    for name in MODELS:
        assert "needs text embeddings" in results[0][name]["text"]
