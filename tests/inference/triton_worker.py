"""Runs the Triton kernels in Triton's interpreter, on a CPU, and compares them with ``torch_ops``.

Started by ``test_triton_ops.py`` with TRITON_INTERPRET=1, which must be set before Triton is imported. Prints the
largest difference of each comparison as JSON.
"""

import json
import os

import torch
import triton
import triton.language as tl

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference import torch_ops, triton_kernels, triton_ops
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.sampling import SamplingOptions, kept_probabilities
from cosmos_mcore.inference.weights import Matrix, quantize
from cosmos_mcore.model.presets import ModelArch
from tests.conftest import GOLDEN
from tests.inference.models import NO_GROUP, random_weights


def difference(one, other):
    return (one.float() - other.float()).abs().max().item()


def linears(random):
    """Every feature of the product, at sizes that fill no tile evenly."""
    for rows, channels, inner in ((1, 40, 300), (16, 33, 514)):
        x, norm = random(rows, inner), 1 + random(inner) / 10
        weight, residual = random(channels, inner), random(rows, channels)
        tall = random(2 * channels, inner)
        for name, arguments in {
            "plain": (Matrix(weight), {}),
            "norm": (Matrix(weight), {"norm": norm, "eps": 1e-5}),
            "residual": (Matrix(weight), {"residual": residual}),
            "gated": (Matrix(tall), {"norm": norm, "eps": 1e-5, "gated": True}),
            "fp8": (quantize(weight), {"norm": norm, "eps": 1e-5}),
            "fp8 gated": (quantize(tall), {"gated": True}),
        }.items():
            matrix, options = arguments
            expected = torch_ops.linear(x, matrix, **options)
            result = triton_ops.linear(x, matrix, **options)
            yield f"linear {name} {rows}", difference(result, expected) / expected.std()


def attentions(random):
    """Grouped queries, sizes that are no powers of two, caches filled to one position, in part and wholly."""
    for batch, groups, queries, size, capacity in ((2, 2, 4, 32, 200), (1, 1, 1, 64, 130), (1, 3, 2, 24, 70)):
        cos, sin = random(capacity, size // 2), random(capacity, size // 2)
        norms = 1 + random(size) / 10, 1 + random(size) / 10
        for at in (0, capacity // 2, capacity - 1):
            position = torch.tensor([at])
            qkv = random(batch, groups * (queries + 2) * size)
            caches = random(batch, groups, capacity, size), random(batch, groups, capacity, size)
            others = tuple(cache.clone() for cache in caches)
            expected = torch_ops.rotate_and_store(qkv, *caches, position, cos, sin, *norms, 1e-5)
            query = triton_ops.rotate_and_store(qkv, *others, position, cos, sin, *norms, 1e-5)
            name = f"{batch} {groups} {queries} {size} at {at}"
            yield f"query {name}", difference(query, expected)
            yield f"key {name}", difference(others[0], caches[0])
            yield f"value {name}", difference(others[1], caches[1])
            for cache in caches:  # beyond the position there may be anything
                cache[:, :, at + 1 :] = float("nan")
            yield (
                f"attention {name}",
                difference(triton_ops.attend(query, *caches, position), torch_ops.attend(query, *caches, position)),
            )


@triton.jit
def threshold_kernel(shares, out, limit, v_size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    bits = triton_kernels._threshold(shares + row * v_size, tl.load(limit + row), 0, v_size, False, BLOCK)
    tl.store(out + row, bits)


def kept_sets():
    """The tokens that the bisection of top-p keeps are those of the original."""
    golden = torch.load(GOLDEN / "sampling.pt", weights_only=True)
    logits = golden["logits"].float()
    for case in golden["cases"][::3]:
        shares = ((logits - logits.amax(1, keepdim=True)) / case["temperature"]).exp().contiguous()
        bits = torch.zeros(len(logits), dtype=torch.int32)
        threshold_kernel[(len(logits),)](shares, bits, shares.sum(1) * case["top_p"], logits.size(1), BLOCK=1024)
        wrong = (shares.view(torch.int32) >= bits[:, None]) != case["kept"]
        yield f"kept set T={case['temperature']} p={case['top_p']}", wrong.sum()


def samples():
    """What can be drawn, and how often; the draws depend on seed and position alone."""
    golden = torch.load(GOLDEN / "sampling.pt", weights_only=True)
    logits, position = golden["logits"].float().contiguous(), torch.tensor([5])
    seeds = torch.arange(len(logits))
    yield "greedy", difference(triton_ops.sample(logits, SamplingOptions(0), seeds, position), golden["greedy"][:, 0])
    for settings in ((1.0, 0.8, None), (0.6, None, 5), (1.3, None, None), (0.7, 0.9, 50)):
        options = SamplingOptions(*settings)
        token = triton_ops.sample(logits, options, seeds, position)
        again = triton_ops.sample(logits[1:3].contiguous(), options, seeds[1:3], position)
        yield f"batch {options}", difference(again, token[1:3])
        kept = kept_probabilities(logits, options) > 0
        yield f"kept {options}", float((~kept.gather(1, token[:, None])).sum())
    row, options = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), SamplingOptions(1.0, 0.75)
    drawn = triton_ops.sample(row.expand(40, 4).contiguous(), options, torch.arange(40), position)
    # Beyond what chance makes likely of 40 draws: a difference of 0.24 is three standard deviations.
    yield (
        "frequencies",
        (difference(drawn.bincount(minlength=4) / 40, kept_probabilities(row[None], options)[0]) > 0.24),
    )
    yield "never drawn", drawn.eq(3).sum()
    ties = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).expand(20, 4).contiguous()
    for options in (SamplingOptions(1.0, 0.1), SamplingOptions(1.0, None, 1)):
        drawn = triton_ops.sample(ties, options, torch.arange(20), position)
        yield f"ties {options}", difference(drawn.unique(), torch.tensor([1, 2]))


def generations():
    """Whole steps through the kernels: the same greedy ids as through torch."""
    arch = ModelArch(2, 64, 96, 4, 2, 16, vocab_size=90, embedding_size=90)
    layout = VideoLayout(17, (3, 2, 4), False, 24, 7)
    for fp8 in (False, True):
        network = CachedNetwork(random_weights(arch, fp8=fp8), arch, layout, NO_GROUP)
        prompt = torch.arange(16).view(2, 8)
        ids = []
        for ops in (torch_ops, triton_ops):
            network.ops = ops
            ids.append(TokenGenerator(network, 2, SamplingOptions(0))(prompt, 6, [0, 0]))
        yield f"ids fp8={fp8}", difference(*ids)


def main():
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    assert os.environ["TRITON_INTERPRET"] == "1"
    triton_ops.ATTEND_PROGRAMS = 8  # each takes the interpreter 10 ms
    results = {}
    for part in (linears(random), attentions(random), kept_sets(), samples(), generations()):
        results.update((name, float(value)) for name, value in part)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
