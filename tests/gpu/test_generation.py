"""The decode step on a GPU: its kernels against torch, and whole generations as CUDA graphs."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.offload import Parking, tensors_of
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.model.presets import ModelArch
from tests.inference.models import NO_GROUP, random_weights

pytestmark = pytest.mark.gpu

# Four layers of the 4B, in bf16.
ARCH = ModelArch(num_layers=4, hidden_size=4096)
LAYOUT = VideoLayout(33, (5, 12, 20), False, 1200, 239)


def failures(comparisons, limit):
    results = {name: float(value) for name, value in comparisons}
    assert results
    return {name: value for name, value in results.items() if not value < limit}


def test_kernels_in_float32():
    from tests.inference import kernel_checks

    assert failures(kernel_checks.linears("cuda"), 1e-4) == {}
    assert failures(kernel_checks.attentions("cuda"), 1e-4) == {}
    assert failures(kernel_checks.kept_sets("cuda"), 1e-6) == {}
    assert failures(kernel_checks.samples("cuda"), 1e-6) == {}
    assert failures(kernel_checks.generations("cuda"), 1e-6) == {}


def test_kernels_in_bfloat16_at_real_sizes():
    from tests.inference import kernel_checks

    sizes = ((1, 6144, 4096), (1, 4096, 14336), (8, 14336, 4096), (16, 1000, 4096))
    assert failures(kernel_checks.linears("cuda", torch.bfloat16, sizes), 0.06) == {}
    sizes = ((1, 8, 4, 128, 12800), (8, 8, 4, 128, 12800), (1, 1, 4, 128, 5000), (2, 8, 4, 64, 999))
    assert failures(kernel_checks.attentions("cuda", torch.bfloat16, sizes), 0.06) == {}


@pytest.fixture(scope="module")
def network():
    return CachedNetwork(random_weights(ARCH, device="cuda", dtype=torch.bfloat16), ARCH, LAYOUT, NO_GROUP)


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(0, 64000, (3, 480), generator=torch.Generator().manual_seed(0)).cuda()


def test_the_cache_gives_the_logits_of_one_pass(network, prompt):
    whole = network.prefill(prompt, network.new_cache(3))
    cache = network.new_cache(3)
    network.prefill(prompt[:, :-4], cache)
    for at in range(476, 480):
        logits = network.decode(prompt[:, at], torch.tensor([at], device="cuda"), cache)
    assert (logits - whole).norm() / whole.norm() < 0.04


def test_a_graph_draws_what_single_steps_draw(network, prompt):
    options = SamplingOptions(1.0, 0.8)
    generator = TokenGenerator(network, 3, options)
    captured = generator(prompt, 200, [1, 2, 3])
    assert torch.equal(captured, generator(prompt, 200, [1, 2, 3])), "the same seed gives the same ids"
    assert not torch.equal(captured[:, 480:], generator(prompt, 200, [4, 5, 6])[:, 480:])
    generator._graph = None
    assert torch.equal(captured, generator(prompt, 200, [1, 2, 3]))


def test_overlapping_kernels_change_nothing(network, prompt, monkeypatch):
    from cosmos_mcore.inference import triton_ops

    options = SamplingOptions(1.0, 0.8)
    overlapped = TokenGenerator(network, 3, options)(prompt, 300, [1, 2, 3])
    monkeypatch.setattr(triton_ops, "OVERLAP", False)
    assert torch.equal(overlapped, TokenGenerator(network, 3, options)(prompt, 300, [1, 2, 3]))


def test_no_step_waits_for_the_device(network, prompt):
    generator = TokenGenerator(network, 3, SamplingOptions(1.0, 0.8, 50))
    generator(prompt, 2, [1, 2, 3])
    generator._graph = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            generator.advance()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_greedy_ids_are_those_of_full_passes(network, prompt):
    """Where the two ways differ, the logits of both choices must be nearly equal: bf16 rounds differently."""
    ids = TokenGenerator(network, 1, SamplingOptions(0))(prompt[:1], 40, [0])
    for at in range(480, 520):
        logits = network.prefill(ids[:, :at], network.new_cache(1))[0]
        assert logits[ids[0, at]] > logits.max() - 0.1 * logits.std()


def test_a_model_that_reads_text(prompt):
    """The same graph serves another text; it draws what single steps draw, and the cache gives one pass's logits."""
    arch = replace(ARCH, num_layers=2, embedding_size=64064, context_size=1024)
    layout = replace(LAYOUT, begin_of_video=True, padded_sequence_length=1201)
    network = CachedNetwork(random_weights(arch, device="cuda", dtype=torch.bfloat16), arch, layout, NO_GROUP)
    texts = torch.randn(2, 3, 512, 1024, generator=torch.Generator().manual_seed(5)).bfloat16()
    texts[:, :, 20:] = 0
    begun = F.pad(prompt, (1, 0), value=arch.vocab_size)
    generator = TokenGenerator(network, 3, SamplingOptions(1.0, 0.8), 512)
    captured = [generator(begun, 100, [1, 2, 3], text) for text in texts]
    generator._graph = None
    assert all(
        torch.equal(ids, generator(begun, 100, [1, 2, 3], text)) for ids, text in zip(captured, texts, strict=True)
    )
    whole, cache = network.prefill(begun, network.new_cache(3, 512), texts[0]), network.new_cache(3, 512)
    network.prefill(begun[:, :-4], cache, texts[0])
    for at in range(477, 481):
        logits = network.decode(begun[:, at], torch.tensor([at], device="cuda"), cache)
    assert (logits - whole).norm() / whole.norm() < 0.04


def test_offloading_frees_memory_and_changes_nothing(prompt):
    network = CachedNetwork(random_weights(ARCH, device="cuda", dtype=torch.bfloat16), ARCH, LAYOUT, NO_GROUP)
    options = SamplingOptions(1.0, 0.8)
    before = TokenGenerator(network, 3, options)(prompt, 50, [1, 2, 3])
    weights = sum(tensor.nbytes for tensor in tensors_of(network.weights))
    held = torch.cuda.memory_allocated()
    parking = Parking(network.weights)
    assert torch.cuda.memory_allocated() < held - 0.95 * weights
    for _ in range(2):
        with parking.present():
            assert torch.equal(TokenGenerator(network, 3, options)(prompt, 50, [1, 2, 3]), before)


def test_fp8_weights_halve_the_memory(network, prompt):
    small = CachedNetwork(random_weights(ARCH, True, device="cuda", dtype=torch.bfloat16), ARCH, LAYOUT, NO_GROUP)
    layers = [sum(tensor.nbytes for tensor in tensors_of(each.weights.layers)) for each in (small, network)]
    assert layers[0] < 0.51 * layers[1]
    exact, rounded = (each.prefill(prompt, each.new_cache(3)) for each in (network, small))
    assert (rounded - exact).norm() / exact.norm() < 0.1
    # The kernel reads FP8 as torch does.
    cache = small.new_cache(3)
    small.prefill(prompt[:, :-1], cache)
    logits = small.decode(prompt[:, -1], torch.tensor([479], device="cuda"), cache)
    assert (logits - rounded).norm() / rounded.norm() < 0.04


def test_two_gpus_generate_what_one_does():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    script = str(Path(__file__).parents[2] / "benchmarks" / "generate.py")
    arguments = [script, "--preset", "1b", "--prompt", "5120", "--new", "300"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["processes"] == 2
    assert result["repeatable"]
