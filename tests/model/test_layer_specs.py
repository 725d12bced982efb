"""The CPU's core attention and norm against what they stand for."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from cosmos_mcore.model.layer_specs import RMSNorm, TorchAttention
from cosmos_mcore.model.sequence import zigzag_positions, zigzag_slice

CONFIG = TransformerConfig(
    num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_parallel=False
)


def attention(mask_type=AttnMaskType.causal, kind="self", scale=None):
    return TorchAttention(CONFIG, 1, mask_type, kind, softmax_scale=scale)


def tensors(queries, keys, heads=4, groups=2, batch=2, dim=8):
    generator = torch.Generator().manual_seed(queries + keys)
    shapes = ((queries, batch, heads, dim), (keys, batch, groups, dim), (keys, batch, groups, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def naive(query, key, value, allowed, scale):
    """Softmax of scaled products, one head at a time; query head j reads group j // (heads / groups)."""
    heads = []
    for head in range(query.size(2)):
        group = head // (query.size(2) // key.size(2))
        scores = torch.einsum("qbd,kbd->bqk", query[:, :, head], key[:, :, group]) * scale
        weights = scores.masked_fill(~allowed, float("-inf")).softmax(-1)
        heads.append(torch.einsum("bqk,kbd->qbd", weights, value[:, :, group]))
    return torch.cat(heads, -1)


def check(module, inputs, allowed, scale=8**-0.5, mask=None):
    found, expected = module(*inputs, mask), naive(*inputs, allowed, scale)
    assert found.shape == (len(inputs[0]), 2, 4 * 8)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    for ours, exact in zip(*gradients, strict=True):
        assert torch.allclose(ours, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_with_grouped_queries(groups):
    check(attention(), tensors(7, 7, groups=groups), torch.ones(7, 7, dtype=torch.bool).tril())


def test_cross_attention_sees_all_keys_but_the_masked_ones():
    module = attention(AttnMaskType.padding, "cross")
    check(module, tensors(3, 9), torch.ones(3, 9, dtype=torch.bool))
    forbidden = torch.zeros(2, 1, 1, 9, dtype=torch.bool)
    forbidden[1, ..., 5:] = True
    check(module, tensors(3, 9), ~forbidden[:, 0], mask=forbidden)


def test_softmax_scale():
    check(attention(scale=0.3), tensors(5, 5), torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.3)


@pytest.mark.parametrize(("length", "ranks"), [(8, 2), (48, 2), (48, 4), (12, 1)])
def test_zigzag_ranks_share_the_sequence_and_the_work(length, ranks):
    held = [zigzag_positions(length, rank, ranks) for rank in range(ranks)]
    assert sorted(torch.cat(held).tolist()) == list(range(length))
    assert len({positions.sum().item() for positions in held}) == 1  # a causal query's work grows with its position
    rows = torch.rand(length, 3)
    for rank, positions in enumerate(held):
        assert torch.equal(zigzag_slice(rows, rank, ranks), rows[positions])


def test_norm_rounds_before_the_gain():
    norm = RMSNorm(
        TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, params_dtype=torch.bfloat16), 32
    )
    norm.weight.data = torch.linspace(0.5, 1.5, 32).bfloat16()
    x = (torch.randn(5, 32, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    exact = x.float() * (x.float().square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.allclose(norm(x).float(), exact * norm.weight.float(), rtol=2**-7, atol=0)
    assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_says_whether_its_gradient_must_be_summed(sequence_parallel):
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "tensor_model_parallel_size": 2}
    norm = RMSNorm(TransformerConfig(**sizes, sequence_parallel=sequence_parallel), 32)
    assert norm.weight.sequence_parallel is sequence_parallel
