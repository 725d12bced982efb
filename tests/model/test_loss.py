"""Cross entropy and log-sum-exp over a vocabulary that several ranks share."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.model import loss as loss_module
from cosmos_mcore.model.loss import vocab_parallel_losses
from tests.processes import run_ranks


class OneRank:
    """A process group of one."""

    def rank(self):
        return 0

    def size(self):
        return 1


def example(seed, length, batch, vocab, dtype=torch.float32, spread=3.0):
    """Logits [S, B, V], labels [B, S] and the two gradients [B, S] that arrive from above."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(length, batch, vocab, generator=generator) * spread).to(dtype)
    labels = torch.randint(vocab, (batch, length), generator=generator)
    return logits, labels, *torch.randn(2, batch, length, generator=generator)


def reference(logits, labels, grad_ce, grad_lse):
    """The same in float64 through torch's own functions: values [B, S] and the gradient of the logits."""
    exact = logits.double().requires_grad_()
    rows = exact.transpose(0, 1)
    ce = F.cross_entropy(rows.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    lse = torch.logsumexp(rows, -1)
    ((ce * grad_ce).sum() + (lse * grad_lse).sum()).backward()
    return ce.detach(), lse.detach(), exact.grad


def ours(logits, labels, grad_ce, grad_lse, group=None):
    logits = logits.clone().requires_grad_()
    losses = vocab_parallel_losses(logits, labels, group or OneRank())
    assert losses.cross_entropy.dtype == losses.log_sum_exp.dtype == torch.float32
    ((losses.cross_entropy * grad_ce).sum() + (losses.log_sum_exp * grad_lse).sum()).backward()
    return losses.cross_entropy.detach(), losses.log_sum_exp.detach(), logits.grad


def check(found, expected, rtol=1e-5, atol=1e-5, grad_tolerance=1e-6):
    for value, exact in zip(found[:2], expected[:2], strict=True):
        assert torch.allclose(value.double(), exact, rtol=rtol, atol=atol)
    assert torch.allclose(found[2].double(), expected[2], rtol=grad_tolerance, atol=grad_tolerance)


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 3), st.integers(1, 40), st.integers(1, 50))
def test_values_and_gradients(seed, length, batch, vocab, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss_module, "_CHUNK_ELEMENTS", chunk)  # so few that the rows are cut in most examples
        arguments = example(seed, length, batch, vocab)
        check(ours(*arguments), reference(*arguments))


def test_slices_cover_every_row_once(monkeypatch):
    for elements, expected in ((1, 7), (9, 7), (10, 7), (29, 4), (30, 3), (70, 1), (1000, 1)):
        monkeypatch.setattr(loss_module, "_CHUNK_ELEMENTS", elements)
        slices = loss_module._slices(7, 10)
        assert [row for part in slices for row in range(7)[part]] == list(range(7))
        assert len(slices) == expected


def test_bfloat16_logits_give_float32_losses():
    arguments = example(1, 16, 2, 500, torch.bfloat16)
    found, expected = ours(*arguments), reference(*arguments)
    assert found[2].dtype == torch.bfloat16
    check(found, expected, grad_tolerance=2**-8)
    # The mean of many losses must not be off as a bf16 sum would be.
    assert found[0].mean().item() == pytest.approx(expected[0].mean().item(), rel=1e-6)


def test_extreme_logits_overflow_nothing():
    logits, labels, grad_ce, grad_lse = example(2, 6, 1, 11)
    logits[0] = 3e4
    logits[1] = -3e4
    logits[2], logits[2, :, 3], labels[0, 2] = -1e4, 1e4, 3
    logits[3], logits[3, :, 3], labels[0, 3] = -1e4, 1e4, 5
    found = ours(logits, labels, grad_ce, grad_lse)
    assert all(value.isfinite().all() for value in found)
    assert found[0][0, 2] == 0 and found[0][0, 3] == 2e4
    check(found, reference(logits, labels, grad_ce, grad_lse), atol=4e-3, grad_tolerance=4e-3)  # float32 near 3e4


def test_ignored_positions_have_no_gradient():
    logits, labels, grad_ce, _ = example(3, 8, 2, 13)
    kept = torch.arange(8) >= 5
    _, _, gradient = ours(logits, labels, grad_ce * kept, torch.zeros(2, 8))
    assert not gradient[:5].any()
    assert gradient[5:].any(-1).all()


SPLIT = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss")
    run_ranks("tests.model.test_loss", 2, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("dtype", SPLIT)
def test_two_ranks_share_the_vocabulary(two_ranks, dtype):
    expected = reference(*example(4, 10, 2, 62, SPLIT[dtype]))
    parts = [rank[dtype] for rank in two_ranks]
    whole = torch.cat([part[2] for part in parts], -1)
    for part in parts:
        check((*part[:2], whole), expected, grad_tolerance=1e-6 if dtype == "float32" else 2**-8)


def main(folder):
    """What one rank of ``two_ranks`` runs: its half of the vocabulary."""
    dist.init_process_group("gloo")
    results = {}
    for name, dtype in SPLIT.items():
        logits, *rest = example(4, 10, 2, 62, dtype)
        half = logits.chunk(2, -1)[dist.get_rank()]
        results[name] = ours(half, *rest, group=dist.group.WORLD)
    torch.save(results, f"{folder}/{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    import sys

    main(sys.argv[1])


EXTREMES = (0.0, 1e-30, 80.0, -80.0, 30000.0, -30000.0)


def check_kernels(device, dtype, vocab, first, spread):
    """The Triton kernels against the torch functions that they stand for."""
    from cosmos_mcore.model import loss_kernel

    rows = 7
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * spread).to(dtype)
    for row, value in enumerate(EXTREMES):
        logits[row, row % vocab] = value  # rows with one logit far from all others
    labels = torch.randint(0, 2 * vocab, (rows,), generator=generator)
    labels[0], labels[1] = first, first + vocab - 1  # first and last of this rank's part
    grads = torch.randn(2, rows, generator=generator)
    grads[:, 2] = 0  # an ignored position
    expected = loss_module.log_sum_exp_and_target(logits, labels, first)
    found = loss_kernel.log_sum_exp_and_target(logits.to(device), labels.to(device), first)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-6, atol=1e-5)
    gradient = loss_module.logits_to_gradient_(logits.clone(), labels, first, expected[0], *grads)
    arguments = [value.to(device) for value in (logits.clone(), labels)]
    ours = loss_kernel.logits_to_gradient_(*arguments, first, *(v.to(device) for v in (expected[0], *grads)))
    assert ours.data_ptr() == arguments[0].data_ptr()
    # Triton's interpreter cuts float32 off to bf16 instead of rounding.
    tolerance = 2**-7 if dtype is torch.bfloat16 else 1e-5
    assert torch.allclose(ours.cpu().float(), gradient.float(), rtol=tolerance, atol=1e-6)
    assert ours[2].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocab", "first"), [(1, 0), (500, 0), (500, 500), (4096, 0), (4100, 4100)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_kernels_in_the_interpreter(dtype, vocab, first, spread, triton_interpreter):
    check_kernels("cpu", dtype, vocab, first, spread)
