"""The decoder's Triton kernels against torch's functions: on a CPU interpreted, in sizes that fit no block."""

import pytest
import torch
import torch.nn.functional as F

from cosmos_mcore.inference.diffusion import attention

kernels = pytest.importorskip("cosmos_mcore.inference.diffusion.kernels")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


@pytest.mark.parametrize("size", [48, 256])
def test_modulated_norm(size):
    x, shift, scale = drawn(2, 13, size), drawn(size), drawn(size + 1)[1:]
    expected = F.layer_norm(x, (size,), 1 + scale, shift, 1e-6)
    torch.testing.assert_close(kernels.modulated_norm(x, shift, scale, 1e-6), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [24, 128])
@pytest.mark.parametrize("turned", [False, True])
def test_norm_heads(size, turned):
    heads, gain, angles = drawn(2, 7, 3, size), drawn(size), drawn(7, 1, size // 2)
    rotary = (angles.cos(), angles.sin()) if turned else None
    expected = attention._norm_heads(heads.cpu(), gain.cpu(), rotary and tuple(part.cpu() for part in rotary))
    made = kernels.norm_heads(heads, gain, rotary, 1e-6)
    assert made is heads
    torch.testing.assert_close(made.cpu(), expected, atol=1e-5, rtol=1e-5)


def test_scale_rows():
    matrix, factors = drawn(5, 5000), drawn(5)
    assert torch.equal(kernels.scale_rows(matrix, factors), matrix * factors[:, None])
