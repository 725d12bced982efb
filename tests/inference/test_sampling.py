"""The next token: the original's numbers, and the properties that hold for any logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.inference.sampling import SamplingOptions, pick, ranked_probabilities, sample_tokens
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def golden():
    return torch.load(GOLDEN / "sampling.pt", weights_only=True)


def in_token_order(probabilities, ids):
    return torch.zeros_like(probabilities).scatter(-1, ids, probabilities)


def test_top_p_keeps_and_weighs_as_the_original(golden):
    for case in golden["cases"]:
        options = SamplingOptions(case["temperature"], case["top_p"])
        ranked, ids = ranked_probabilities(golden["logits"], options)
        probabilities = in_token_order(ranked, ids)
        assert torch.equal(probabilities > 0, case["kept"])
        assert torch.allclose(probabilities, case["probs"], rtol=0, atol=1e-6)


def test_token_from_recorded_noise(golden):
    cases = [case for case in golden["cases"] if case["exp_noise_sorted"] is not None]
    assert cases
    for case in cases:
        ranked, ids = ranked_probabilities(golden["logits"], SamplingOptions(case["temperature"], case["top_p"]))
        assert torch.equal(pick(ranked, ids, case["exp_noise_sorted"]), case["token"].squeeze(-1))


def test_top_k_weighs_as_the_original(golden):
    for case in golden["top_k_cases"]:
        options = SamplingOptions(case["temperature"], top_p=None, top_k=case["top_k"])
        probabilities = in_token_order(*ranked_probabilities(golden["logits"], options))
        assert torch.allclose(probabilities, case["probs"], rtol=0, atol=1e-6)


def test_greedy_ignores_top_p(golden):
    assert torch.equal(sample_tokens(golden["logits"], SamplingOptions(0, 0.1)), golden["greedy"].squeeze(-1))


def test_bfloat16_logits_are_sampled_in_float32(golden):
    logits = golden["logits"].bfloat16()
    ranked, _ = ranked_probabilities(logits, SamplingOptions(1.0, 0.8))
    assert ranked.dtype == torch.float32
    assert torch.equal(ranked, ranked_probabilities(logits.float(), SamplingOptions(1.0, 0.8))[0])


def test_frequencies_follow_the_probabilities():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20000, 4)
    drawn = sample_tokens(logits, SamplingOptions(1.0, 0.75), torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / drawn.numel()
    # 0.4 + 0.3 does not exceed 0.75, so the third stays and the fourth goes.
    assert torch.allclose(share, torch.tensor([4, 3, 2, 0]) / 9, atol=0.015)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 3.0), st.floats(0.0, 1.0), st.integers(1, 60))
def test_drawn_tokens_are_kept_ones_and_repeatable(seed, temperature, top_p, top_k):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed)) * 4
    options = SamplingOptions(temperature, top_p, top_k)
    ranked, ids = ranked_probabilities(logits, options)
    assert torch.allclose(ranked.sum(-1), torch.ones(3))
    assert ((ranked > 0).sum(-1) <= top_k).all()
    probabilities = in_token_order(ranked, ids)
    assert torch.equal(probabilities.argmax(-1), logits.argmax(-1))
    first, again = (sample_tokens(logits, options, torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(first, again)
    assert (probabilities.gather(-1, first[:, None]) > 0).all()


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 1.2}, {"top_p": -0.1}, {"top_k": 0}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingOptions(**options)
