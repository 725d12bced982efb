"""Our Adam against torch's, its master weights in two halves, and its random rounding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.training.adam import Adam, Hyperparameters, adam_update_torch, join, random_bits, split

VALUES = Hyperparameters(
    lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.05, step=3, clip_grad=1.0, seed=12345
)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_halves_of_a_master_weight_give_back_every_bit(bits):
    master = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    weight, remainder = split(master)
    assert torch.equal(join(weight, remainder).view(torch.int32), master.view(torch.int32))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_upper_half_is_the_weight_rounded_to_nearest(values):
    master = torch.tensor(values, dtype=torch.float32)
    weight = split(master)[0]
    nearest = master.bfloat16()
    # Exact ties may go the other way; both neighbours are then equally near.
    tie = (master.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(weight[~tie], nearest[~tie])


def adam_of(parameter, clip_grad=0.0, moments=torch.float32, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.05):
    group = {"params": [parameter], "lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": weight_decay}
    return Adam([group], clip_grad=clip_grad, moments_dtype=moments)


def gradients(steps, size, seed=0):
    return torch.randn(steps, size, generator=torch.Generator().manual_seed(seed))


def run(adam, parameter, grads):
    for grad in grads:
        parameter.decoupled_grad, adam.grad_norm = grad, grad.float().norm().reshape(1)
        adam.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip_grad", [0.0, 1.0])
def test_same_updates_as_torch(dtype, clip_grad):
    start = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = start.double().requires_grad_()
    reference = torch.optim.AdamW([exact], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05)
    parameter = start.clone()
    adam = adam_of(parameter, clip_grad)
    grads = gradients(20, 1000)
    run(adam, parameter, grads)
    for grad in grads:
        exact.grad = grad.double()
        if clip_grad:
            torch.nn.utils.clip_grad_norm_([exact], clip_grad)
        reference.step()
    master = adam.get_unscaled_state(parameter, "master_param")
    assert torch.allclose(master.double(), exact.detach(), rtol=2e-6, atol=2e-6)
    assert torch.allclose(
        parameter.double(), exact.detach(), rtol=2**-8 if dtype is torch.bfloat16 else 2e-6, atol=2e-6
    )


def test_tiny_updates_of_a_bf16_weight_add_up():
    """A thousand steps of 1e-5 vanish in bf16 arithmetic; the remainder keeps them."""
    parameter = torch.ones(4, dtype=torch.bfloat16)
    adam = adam_of(parameter, lr=1e-5, betas=(0.0, 0.0), weight_decay=0.0)
    run(adam, parameter, torch.ones(1000, 4))
    assert parameter[0].item() == pytest.approx(0.99, rel=2**-8)
    assert adam.get_unscaled_state(parameter, "master_param")[0].item() == pytest.approx(0.99, rel=1e-4)


def test_bf16_moments_are_right_on_average():
    """With beta2 = 0.999, bf16 rounded to nearest would leave the second moment where it is for ever."""
    parameter = torch.zeros(20000, dtype=torch.bfloat16)
    adam = adam_of(parameter, moments=torch.bfloat16, lr=0.0, betas=(0.9, 0.999), weight_decay=0.0)
    run(adam, parameter, torch.ones(1, 20000))
    for name, value in (("exp_avg", 0.1), ("exp_avg_sq", 0.001)):
        state = adam.state[parameter][name]
        assert state.dtype is torch.bfloat16
        assert state.double().mean().item() == pytest.approx(value, rel=1e-4)
    run(adam, parameter, torch.zeros(200, 20000))
    assert adam.state[parameter]["exp_avg_sq"].double().mean().item() == pytest.approx(0.001 * 0.999**200, rel=2e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    parameter = torch.ones(100, dtype=torch.bfloat16)
    adam = adam_of(parameter, moments=torch.bfloat16)
    run(adam, parameter, gradients(2, 100))
    before = [parameter.clone(), *(state.clone() for state in adam.state[parameter].values())]
    run(adam, parameter, [torch.full((100,), bad)])
    after = [parameter, *adam.state[parameter].values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_states_travel_as_float32(moments):
    parameter = torch.randn(64).bfloat16()
    adam = adam_of(parameter, moments=moments)
    run(adam, parameter, gradients(3, 64))
    names = ("master_param", "exp_avg", "exp_avg_sq")
    states = {name: adam.get_unscaled_state(parameter, name).clone() for name in names}
    assert all(state.dtype is torch.float32 for state in states.values())

    other = torch.zeros(64, dtype=torch.bfloat16)
    fresh = adam_of(other, moments=moments)
    for name, state in states.items():
        fresh.set_scaled_state(other, name, state)
    fresh.load_state_dict(adam.state_dict())
    more = gradients(3, 64, seed=1)
    run(adam, parameter, more)
    run(fresh, other, more)
    assert torch.equal(parameter, other)
    for name in names:
        assert torch.equal(adam.get_unscaled_state(parameter, name), fresh.get_unscaled_state(other, name))


def test_random_bits_are_fair_and_repeatable():
    bits = random_bits(100_000, 7, torch.device("cpu"))
    assert bits.min() >= 0 and bits.max() < 2**32
    assert torch.equal(bits, random_bits(100_000, 7, torch.device("cpu")))
    for part in (bits & 0xFFFF, bits >> 16):
        assert (part.double() / 65536).mean().item() == pytest.approx(0.5, abs=5e-3)
    other = random_bits(100_000, 8, torch.device("cpu"))
    assert (bits == other).float().mean() < 1e-3


def tensors(dtype, grad_dtype, moments, size=5000, device="cpu"):
    generator = torch.Generator().manual_seed(3)
    draw = lambda: torch.randn(size, generator=generator)  # noqa: E731
    parameter = draw().to(dtype)
    remainder = (
        torch.randint(-(2**15), 2**15, (size,), generator=generator, dtype=torch.int16)
        if dtype is torch.bfloat16
        else parameter
    )
    state = [parameter, remainder, draw().to(grad_dtype), (draw() * 0.1).to(moments), (draw() ** 2 * 0.01).to(moments)]
    return [value.to(device) for value in state]


KINDS = [
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.float32, torch.float32),
]


def check_kernel(kernel, dtype, grad_dtype, moments, device):
    """A Triton update against the torch one: equal up to the last bit of float32 or of a bf16 moment."""
    expected = tensors(dtype, grad_dtype, moments)
    found = [value.clone().to(device) for value in expected]
    if dtype is torch.float32:
        found[1] = found[0]
    norm = expected[2].float().norm().reshape(1)
    adam_update_torch(*expected, norm, VALUES)
    kernel(*found, norm.to(device), VALUES)
    found = [value.cpu() for value in found]
    masters = [join(*pair[:2]) if dtype is torch.bfloat16 else pair[0] for pair in (expected, found)]
    assert torch.allclose(masters[1], masters[0], rtol=1e-5, atol=1e-6)
    for a, b in zip(found[3:], expected[3:], strict=True):
        # Where the float32 values differ in the last bit, the same random number may round to the neighbour.
        assert torch.allclose(a.float(), b.float(), rtol=2**-7 if moments is torch.bfloat16 else 1e-5, atol=1e-7)
        assert (a != b).float().mean() < (1e-3 if moments is torch.bfloat16 else 1.1)
    before = [value.clone() for value in found]
    again = [value.to(device) for value in found]
    if dtype is torch.float32:
        again[1] = again[0]
    kernel(*again, torch.full((1,), float("nan"), device=device), VALUES)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(again, before, strict=True))


@pytest.mark.parametrize(("dtype", "grad_dtype", "moments"), KINDS)
def test_kernel_in_the_interpreter(dtype, grad_dtype, moments, triton_interpreter):
    from cosmos_mcore.training.adam_kernel import adam_update_triton

    check_kernel(adam_update_triton, dtype, grad_dtype, moments, "cpu")
