"""The network and the sampler against the original's numbers."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cosmos_mcore.inference.diffusion import fp8
from cosmos_mcore.inference.diffusion.network import DiffusionNetwork, DiffusionSize, flops_per_call
from cosmos_mcore.inference.diffusion.rotary import rotary_angles
from cosmos_mcore.inference.diffusion.sampler import c_noise, noise_generator, noise_levels, sample
from tests.inference.diffusion.small import SMALL, golden_network, random_network, write_released
from tests.processes import run_ranks

RELEASED_PARAMETERS, RELEASED_TENSORS = 7.237e9, 568  # spec/inference.md section 6, without the list of positions


@pytest.fixture
def golden(shared_dir):
    return torch.load(shared_dir / "golden" / "diffusion_decoder.pt", weights_only=True)


def test_released_size():
    with torch.device("meta"):
        state = DiffusionNetwork(DiffusionSize()).state_dict()
    assert len(state) == RELEASED_TENSORS
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(RELEASED_PARAMETERS, rel=1e-4)
    assert state["x_embedder.proj.1.weight"].shape == (4096, 196)


@torch.no_grad()
def test_golden_outputs(golden):
    network = golden_network(golden)
    for case in golden["forward"]:
        output = network(
            case["x"],
            case["tokens"][0].long(),
            case["crossattn_emb"],
            case["c_noise"],
            fps=case["fps"],
            padding_mask=case["padding_mask"],
        )
        worst = (output - case["output"]).abs().max().item()
        print(f"{case['name']}: {worst:.1e}")
        assert worst < 1e-4, case["name"]
        if case["rope_angles"] is not None:
            angles = rotary_angles(tuple(case["tokens"].shape[2:]), 64, case["fps"])
            assert torch.equal(angles.repeat(1, 2), case["rope_angles"])


@torch.no_grad()
def test_golden_trajectory(golden):
    expected, network = golden["sampler"], golden_network(golden)
    levels = noise_levels()
    assert levels == pytest.approx(expected["sigmas"].tolist(), rel=2e-6)
    assert [c_noise(sigma) for sigma in levels[:-1]] == pytest.approx(expected["c_noise"].tolist(), abs=1e-6)
    tokens = expected["tokens"][0].long()
    branches = torch.stack([tokens[0], torch.zeros_like(tokens[0])])
    noise = torch.randn(expected["noise"].shape, generator=noise_generator(expected["seed"]))
    assert torch.equal(noise, expected["noise"])

    def predict(scaled, level):
        return network(scaled, branches, expected["crossattn_emb"], level)

    for steps in (1, 2, 8, 15):
        latent = sample(predict, noise, levels[: steps + 1])
        truth = expected["final_latent" if steps == 15 else f"latent_after_step{steps}"]
        worst = ((latent - truth).abs().max() / truth.std()).item()
        print(f"after {steps} steps: {worst:.1e}")
        assert worst < 2e-4


@torch.no_grad()
def test_rows_of_a_batch_and_rows_without_text():
    """Both guidance branches in one call; the one without text skips what would add zero."""
    network, draw = random_network(), torch.Generator().manual_seed(1)
    latent, text = torch.randn(1, 16, 3, 4, 6, generator=draw), torch.randn(1, 5, 16, generator=draw)
    tokens = torch.randint(50, (2, 3, 2, 3), generator=draw)
    both = network(latent, tokens, text, 0.3)
    assert both.shape == (2, 16, 3, 4, 6)
    torch.testing.assert_close(both[:1], network(latent, tokens[:1], text, 0.3), atol=1e-5, rtol=0)
    zeros = network(latent, tokens[1:], torch.zeros_like(text), 0.3)
    torch.testing.assert_close(both[1:], zeros, atol=1e-5, rtol=0)
    assert (both[:1] - network(latent, tokens[:1], 2 - text, 0.3)).abs().max() > 0.01  # text is read
    assert (both[:1] - network(latent, tokens[:1].flip(1), text, 0.3)).abs().max() > 0.01  # ids are


def test_flops_of_a_call():
    counter = FlopCounterMode(display=False)
    network = random_network()
    tokens = torch.zeros(2, 3, 2, 3, dtype=torch.int64)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the counter knows no other kernel of CPUs
        network(torch.randn(1, 16, 3, 4, 6), tokens, torch.randn(1, 5, 16), 0.3)
    width, rank = SMALL.channels, SMALL.adaln_rank
    parts = 3 * SMALL.blocks  # with shift, scale and gate each; the final layer has no gate
    from_noise_level = 4 * width**2 + parts * 4 * rank * width + 3 * rank * width
    assert sum(flops_per_call(SMALL, 18, 2, 1, 5)) == counter.get_total_flops() - 2 * from_noise_level


@torch.no_grad()
def test_bfloat16_is_as_near_as_the_originals(golden):
    network, case = golden_network(golden).bfloat16(), golden["forward"][0]
    output = network(case["x"], case["tokens"][0].long(), case["crossattn_emb"], case["c_noise"], fps=case["fps"])
    assert output.dtype == torch.bfloat16
    error = (output.float() - case["output"]).norm() / case["output"].norm()
    assert error < 1.5 * golden["bf16_run_relative_error_high_noise"]


@torch.no_grad()
def test_8_bits_are_near(golden):
    network, case = golden_network(golden), golden["forward"][0]
    network.to_fp8()
    output = network(case["x"], case["tokens"][0].long(), case["crossattn_emb"], case["c_noise"], fps=case["fps"])
    error = ((output - case["output"]).norm() / case["output"].norm()).item()
    print(f"FP8: relative {error:.1e}")
    assert 1e-3 < error < 0.1
    assert sum(isinstance(module, fp8.Fp8Linear) for module in network.modules()) == 8 * network.size.blocks


def test_compiled_rounding_has_one_graph_without_breaks():
    """What GPUs run; here without making code."""
    x, shift, scale = torch.randn(2, 6, 16).bfloat16(), torch.randn(16).bfloat16(), torch.randn(16).bfloat16()
    for function, arguments in (
        (fp8._round, (x,)),
        (fp8._gelu_and_round, (x,)),
        (fp8._norm_and_round, (x, shift, scale, 1e-6)),
    ):
        made = torch.compile(function, backend="eager", fullgraph=True)(*arguments)
        expected = function(*arguments)
        for part, other in zip(made, expected, strict=True):
            assert torch.equal(part.float(), other.float())


@pytest.mark.parametrize("ranks", [2, *(pytest.param(n, marks=pytest.mark.layouts) for n in (4, 8))])
def test_context_parallel(tmp_path, ranks):
    """Processes that share the latent frames against one: network and whole decoder."""
    run_ranks("tests.inference.diffusion.parallel_worker", ranks, write_released(tmp_path), timeout=200)
