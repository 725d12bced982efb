"""Start weights: a pure function of (seed, name)."""

import pytest
import torch

from cosmos_mcore.model.init import initial_tensor
from cosmos_mcore.model.presets import PRESETS

ARCH = PRESETS["tiny"]
CPU = torch.device("cpu")


def draw(name, shape=(400, 300), seed=0):
    return initial_tensor(name, shape, ARCH, seed, CPU)


def test_depends_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = draw("layers.1.attention.wq.weight")
    state = torch.get_rng_state()
    draw("output.weight")
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move
    torch.manual_seed(2)
    assert torch.equal(draw("layers.1.attention.wq.weight"), first)
    assert not torch.equal(draw("layers.1.attention.wk.weight"), first)
    assert not torch.equal(draw("layers.2.attention.wq.weight"), first)
    assert not torch.equal(draw("layers.1.attention.wq.weight", seed=1), first)


# spec/model.md section 6
@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("tok_embeddings.weight", 1.0),
        *[(f"layers.7.attention.{w}.weight", 0.02) for w in ("wq", "wk", "wv")],
        ("layers.7.feed_forward.w1.weight", 0.02),
        ("layers.0.attention.wo.weight", 0.02 / 2**0.5),
        ("layers.7.attention.wo.weight", 0.02 / 4),
        ("layers.7.feed_forward.w2.weight", 0.02 / 4),
        ("layers.7.feed_forward.w3.weight", 0.02 / 4),
        ("layers.7.cross_attention.wk.weight", 0.02),
        ("layers.7.cross_attention.wo.weight", 0.02 / 4),
        ("output.weight", ARCH.hidden_size**-0.5),
    ],
)
def test_spread(name, std):
    tensor = draw(name)
    assert tensor.dtype == torch.float32
    assert tensor.std().item() == pytest.approx(std, rel=0.01)
    assert abs(tensor.mean().item()) < 0.02 * std


def test_output_layer_is_cut_at_three_sigma():
    assert draw("output.weight").abs().max().item() == pytest.approx(3 * ARCH.hidden_size**-0.5)


def test_norms_start_at_one():
    for name in ("norm.weight", "layers.3.attention_norm.weight", "layers.0.attention.q_norm.weight"):
        assert torch.equal(draw(name, (5,)), torch.ones(5))
