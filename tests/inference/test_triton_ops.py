"""The kernels of the decode step, in Triton's interpreter (tests/gpu has them on a GPU)."""

import pytest


@pytest.fixture
def checks(triton_interpreter, monkeypatch):
    """The comparisons, with few programs per attention: each takes the interpreter 10 ms."""
    from cosmos_mcore.inference import triton_ops
    from tests.inference import kernel_checks

    monkeypatch.setattr(triton_ops, "ATTEND_PROGRAMS", 8)
    return kernel_checks


@pytest.mark.parametrize("part", ["linears", "attentions", "kept_sets", "samples", "generations"])
def test_kernels_compute_what_torch_does(checks, part):
    results = {name: float(value) for name, value in getattr(checks, part)("cpu")}
    assert results
    assert {name: value for name, value in results.items() if not value < 2e-5} == {}


def test_fp8_products_of_bfloat16(checks):
    """Those are computed in float16; the interpreter knows no products of bfloat16 itself."""
    results = {name: value for name, value in checks.linears("cpu", checks.torch.bfloat16) if "fp8" in name}
    assert results
    assert {name: value for name, value in results.items() if not value < 0.05} == {}
