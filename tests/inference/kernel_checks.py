"""Compares the Triton kernels of the decode step with ``torch_ops``: in the interpreter, and on a GPU (tests/gpu).

Each function yields names and differences, which must be nearly 0. Import it only where Triton is installed.
"""

import torch

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference import torch_ops, triton_ops
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.sampling import SamplingOptions, kept_probabilities
from cosmos_mcore.inference.weights import Matrix, quantize
from cosmos_mcore.model.presets import ModelArch
from tests.conftest import GOLDEN
from tests.inference.models import NO_GROUP, random_weights


def difference(one, other):
    return (one.float() - other.float()).abs().max().item()


def source(device, dtype=torch.float32):
    """Random tensors, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)


def linears(device, dtype=torch.float32, sizes=((1, 40, 300), (16, 33, 514))):
    """Every feature of the product; the default sizes fill no tile evenly."""
    random = source(device, dtype)
    for rows, channels, inner in sizes:
        x, norm = random(rows, inner), 1 + random(inner) / 10
        weight, residual = random(channels, inner), random(rows, channels)
        tall = random(2 * channels, inner)
        for name, (matrix, options) in {
            "plain": (Matrix(weight), {}),
            "norm": (Matrix(weight), {"norm": norm, "eps": 1e-5, "dtype": torch.float32}),
            "residual": (Matrix(weight), {"residual": residual}),
            "gated": (Matrix(tall), {"norm": norm, "eps": 1e-5, "gated": True}),
            "fp8": (quantize(weight), {"norm": norm, "eps": 1e-5}),
            "fp8 gated": (quantize(tall), {"gated": True}),
        }.items():
            # Expected in float32 from the same rounded numbers, but the scaled FP8 weights, which torch rounds again.
            wide = Matrix(matrix.dense(torch.float32).float())
            expected = torch_ops.linear(
                x.float(),
                wide,
                **{key: value.float() if torch.is_tensor(value) else value for key, value in options.items()},
            )
            result = triton_ops.linear(x, matrix, **options)
            assert result.dtype == options.get("dtype", dtype)
            yield f"linear {name} {rows} {channels} {inner}", difference(result, expected) / expected.std().item()


def attentions(device, dtype=torch.float32, sizes=((2, 2, 4, 32, 200), (1, 1, 1, 64, 130), (1, 3, 2, 24, 70))):
    """Grouped queries, sizes that are no powers of two, caches filled to one position, in part and wholly."""
    random = source(device, dtype)
    for batch, groups, queries, size, capacity in sizes:
        cos, sin = random(capacity, size // 2).float(), random(capacity, size // 2).float()
        norms = 1 + random(size) / 10, 1 + random(size) / 10
        for at in (0, capacity // 2, capacity - 1):
            position = torch.tensor([at], device=device)
            qkv = random(batch, groups * (queries + 2) * size)
            caches = random(batch, groups, capacity, size), random(batch, groups, capacity, size)
            for cache in caches:  # from the position on there may be anything
                cache[:, :, at:] = float("nan")
            wide = [tensor.float() for tensor in caches]
            rest = position, cos, sin
            expected = torch_ops.attend(qkv.float(), *wide, *rest, *(norm.float() for norm in norms), 1e-5)
            attended = triton_ops.attend(qkv, *caches, *rest, *norms, 1e-5)
            name = f"{batch} {groups} {queries} {size} at {at}"
            yield f"attention {name}", difference(attended, expected)
            for what, ours, cache in zip(("key", "value"), caches, wide, strict=True):
                assert ours[:, :, at + 1 :].isnan().all()
                yield f"{what} {name}", difference(ours[:, :, : at + 1], cache[:, :, : at + 1])


def kept_sets(device):
    """The tokens that the search for top-p's threshold keeps are those of the original."""
    golden = torch.load(GOLDEN / "sampling.pt", weights_only=True)
    logits = golden["logits"].float().to(device).contiguous()
    for case in golden["cases"][::3]:
        draw = triton_ops._Draw(logits)
        draw.shares = ((logits - logits.amax(1, keepdim=True)) / case["temperature"]).exp()
        padded = torch.nn.functional.pad(draw.shares, (0, draw.chunks * draw.block - draw.vocabulary))
        draw.sums = padded.unflatten(1, (draw.chunks, draw.block)).sum(2)
        draw.bounds[:] = torch.tensor([-1, 0x3F800000], device=device)
        draw.narrow(case["top_p"], False)
        low, high = draw.bounds.unbind(1)
        assert torch.all(high - low <= 32), "the last numbers lie next to each other"
        over = (draw.weights.sum(1) > case["top_p"] * draw.sums.sum(1, keepdim=True)).sum(1)
        wrong = (draw.shares.view(torch.int32) > (low + over)[:, None]) != case["kept"].to(device)
        yield f"kept set T={case['temperature']} p={case['top_p']}", wrong.sum()


def samples(device):
    """What can be drawn, and how often; the draws depend on seed and position alone."""
    golden = torch.load(GOLDEN / "sampling.pt", weights_only=True)
    logits, position = golden["logits"].float().to(device).contiguous(), torch.tensor([5], device=device)
    seeds = torch.arange(len(logits), device=device)
    yield (
        "greedy",
        difference(triton_ops.sample(logits, SamplingOptions(0), seeds, position), golden["greedy"][:, 0].to(device)),
    )
    for settings in ((1.0, 0.8, None), (0.6, None, 5), (1.3, None, None), (0.7, 0.9, 50)):
        options = SamplingOptions(*settings)
        token = triton_ops.sample(logits, options, seeds, position)
        again = triton_ops.sample(logits[1:3].contiguous(), options, seeds[1:3], position)
        yield f"batch {options}", difference(again, token[1:3])
        kept = kept_probabilities(logits, options) > 0
        yield f"kept {options}", float((~kept.gather(1, token[:, None])).sum())
    row, options = torch.tensor([0.4, 0.3, 0.2, 0.1], device=device).log(), SamplingOptions(1.0, 0.75)
    drawn = triton_ops.sample(row.expand(40, 4).contiguous(), options, torch.arange(40, device=device), position)
    # Beyond what chance makes likely of 40 draws: a difference of 0.24 is three standard deviations.
    yield (
        "frequencies",
        (difference(drawn.bincount(minlength=4) / 40, kept_probabilities(row[None], options)[0]) > 0.24),
    )
    yield "never drawn", drawn.eq(3).sum()
    ties = torch.tensor([[1.0, 2.0, 2.0, 0.0]], device=device).expand(20, 4).contiguous()
    for options in (SamplingOptions(1.0, 0.1), SamplingOptions(1.0, None, 1)):
        drawn = triton_ops.sample(ties, options, torch.arange(20, device=device), position)
        yield f"ties {options}", difference(drawn.unique(), torch.tensor([1, 2], device=device))


def generations(device):
    """Whole steps through the kernels (on a GPU: as a CUDA graph): the same greedy ids as through torch, or nearly."""
    arch = ModelArch(2, 64, 96, 4, 2, 16, vocab_size=90, embedding_size=90)
    layout = VideoLayout(17, (3, 2, 4), False, 24, 7)
    for fp8 in (False, True):
        prompt = torch.arange(16).view(2, 8)
        ids = []
        for where, ops in (("cpu", torch_ops), (device, triton_ops)):
            network = CachedNetwork(random_weights(arch, fp8=fp8, device=where), arch, layout, NO_GROUP)
            network.ops = ops
            generator = TokenGenerator(network, 2, SamplingOptions(0))
            ids.append(generator(prompt.to(where), 6, [0, 0]).cpu())
        yield f"ids fp8={fp8}", difference(*ids)
