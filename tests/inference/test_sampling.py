"""The next token: the original's numbers, and the properties that hold for any logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.inference.sampling import (
    SamplingOptions,
    exponential_noise,
    kept_probabilities,
    pick,
    sample_tokens,
)
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "sampling.pt", weights_only=True)


def test_top_p_keeps_and_weighs_as_the_original(golden):
    for case in golden["cases"]:
        probabilities = kept_probabilities(golden["logits"], SamplingOptions(case["temperature"], case["top_p"]))
        assert torch.equal(probabilities > 0, case["kept"])
        assert torch.allclose(probabilities, case["probs"], rtol=0, atol=1e-6)


def test_token_from_recorded_noise(golden):
    cases = [case for case in golden["cases"] if case["exp_noise_sorted"] is not None]
    assert cases
    for case in cases:
        # The original draws its noise in the order of the sorted probabilities.
        order = golden["logits"].sort(dim=-1, descending=True).indices
        noise = torch.zeros_like(golden["logits"]).scatter(-1, order, case["exp_noise_sorted"])
        probabilities = kept_probabilities(golden["logits"], SamplingOptions(case["temperature"], case["top_p"]))
        assert torch.equal(pick(probabilities, noise), case["token"].squeeze(-1))


def test_top_k_weighs_as_the_original(golden):
    for case in golden["top_k_cases"]:
        options = SamplingOptions(case["temperature"], top_p=None, top_k=case["top_k"])
        assert torch.allclose(kept_probabilities(golden["logits"], options), case["probs"], rtol=0, atol=1e-6)


def test_greedy_ignores_top_p(golden):
    seeds = torch.arange(4)
    assert torch.equal(sample_tokens(golden["logits"], SamplingOptions(0, 0.1), seeds, 0), golden["greedy"].squeeze(-1))


def test_bfloat16_logits_are_sampled_in_float32(golden):
    logits = golden["logits"].bfloat16()
    kept = kept_probabilities(logits, SamplingOptions(1.0, 0.8))
    assert kept.dtype == torch.float32
    assert torch.equal(kept, kept_probabilities(logits.float(), SamplingOptions(1.0, 0.8)))


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(4000, 4)
    drawn = sample_tokens(logits, SamplingOptions(1.0, 0.75), torch.arange(4000), 7)
    # 0.4 + 0.3 does not exceed 0.75, so the third stays and the fourth goes.
    assert torch.allclose(drawn.bincount(minlength=4) / drawn.numel(), torch.tensor([4, 3, 2, 0]) / 9, atol=0.03)


def test_equally_likely_tokens_stay_together():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    for options in (SamplingOptions(1.0, 0.1), SamplingOptions(1.0, None, 1)):
        assert torch.allclose(kept_probabilities(logits, options), torch.tensor([[0, 0.5, 0.5, 0]]))


def test_noise_differs_between_seeds_and_positions_and_is_exponential():
    noise = [exponential_noise(torch.tensor([seed]), at, 5000)[0] for seed in (0, 1, 2**40) for at in (0, 1, 4999)]
    for i, one in enumerate(noise):
        assert abs(one.mean() - 1) < 0.06
        assert one.min() > 0
        for other in noise[:i]:
            assert not torch.isin(one, other).sum() > 5


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 3.0), st.floats(0.0, 1.0), st.integers(1, 60))
def test_drawn_tokens_are_kept_ones_and_repeatable(seed, temperature, top_p, top_k):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 4
    options = SamplingOptions(temperature, top_p, top_k)
    probabilities = kept_probabilities(logits, options)
    assert torch.allclose(probabilities.sum(-1), torch.ones(3))
    assert ((probabilities > 0).sum(-1) <= top_k).all()
    assert torch.equal(probabilities.argmax(-1), logits.argmax(-1))
    seeds = torch.tensor([seed, seed + 1, seed])
    first = sample_tokens(logits, options, seeds, 3)
    assert torch.equal(first, sample_tokens(logits, options, seeds, 3))
    assert torch.equal(first[1:2], sample_tokens(logits[1:2], options, seeds[1:2], 3))
    assert (probabilities.gather(-1, first[:, None]) > 0).all()


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.2}, {"top_p": -0.1}, {"top_k": 0}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingOptions(**options)
