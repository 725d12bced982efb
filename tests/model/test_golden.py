"""The original's logits, losses, gradients and five AdamW steps, on one process and with the model split over two."""

import pytest
import torch

from tests.processes import run_ranks

VARIANTS = [
    (1, "base, two micro-batches"),
    (1, "base, distributed optimizer"),
    (1, "yarn"),
    (1, "video2world"),
    (2, "base, two micro-batches"),
    (2, "base, distributed optimizer"),
    (2, "base, sequence parallel"),
    (2, "yarn"),
    (2, "video2world"),
    (2, "video2world, sequence parallel"),
]


def run(world_size, tmp_path_factory):
    folder = tmp_path_factory.mktemp(f"tp{world_size}")
    run_ranks("tests.model.golden_worker", world_size, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run(1, tmp_path_factory)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return run(2, tmp_path_factory)


@pytest.fixture(params=VARIANTS, ids=lambda variant: f"tp{variant[0]}, {variant[1]}")
def ranks(request):
    """One variant's results on every rank."""
    world_size, name = request.param
    return [rank[name] for rank in request.getfixturevalue("one_process" if world_size == 1 else "two_processes")]


@pytest.fixture
def case(request, golden_dir):
    """The original's numbers for the variant."""
    name = request.node.callspec.params["ranks"][1].split(",")[0]
    return torch.load(golden_dir / f"{name}.pt", weights_only=True)


def test_logits(ranks, case):
    for rank in ranks:
        assert torch.allclose(rank["logits"], case["logits"], rtol=0, atol=2e-4)


def test_losses(ranks, case):
    for rank in ranks:
        assert rank["ce"][0] == pytest.approx(case["ce"], rel=1e-6)
        assert rank["z"][0] == pytest.approx(case["z"], rel=1e-6)


def test_gradients(ranks, case):
    assert ranks[0]["grad_norm"] == pytest.approx(case["grad_norm"], rel=1e-5)
    for name, golden in case["grads"].items():
        parts = [rank["gradients"][name] for rank in ranks]
        axis = parts[0][1]
        # A replicated parameter must have the whole gradient on every rank, not a share.
        whole = [torch.cat([part for part, _ in parts], axis)] if axis is not None else [part for part, _ in parts]
        for found in whole:
            assert (found - golden).norm() <= 1e-5 * golden.norm(), name


def test_five_optimizer_steps(ranks, case):
    for rank in ranks:
        totals = [ce + z for ce, z in zip(rank["ce"], rank["z"], strict=True)]
        assert totals == pytest.approx(case["losses"], rel=1e-4)
    assert totals[-1] < 0.75 * totals[0]
