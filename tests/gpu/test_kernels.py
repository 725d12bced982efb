"""The Triton kernels on the GPU, against the torch functions that they stand for."""

import pytest
import torch

from tests.model.test_loss import check_kernels
from tests.training.test_adam import KINDS, check_kernel

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "grad_dtype", "moments"), KINDS)
def test_adam(dtype, grad_dtype, moments):
    from cosmos_mcore.training.adam_kernel import adam_update_triton

    check_kernel(adam_update_triton, dtype, grad_dtype, moments, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("vocab", "first"), [(1, 0), (500, 500), (32000, 32000), (64000, 0)])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_losses(dtype, vocab, first, spread):
    check_kernels("cuda", dtype, vocab, first, spread)
