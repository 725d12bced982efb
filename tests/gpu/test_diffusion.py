"""The diffusion decoder on a GPU: float32 against the original's numbers, bfloat16, FP8, compiled parts, offloading."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference.diffusion import attention, fp8, kernels, network
from cosmos_mcore.inference.diffusion.decoder import DiffusionDecoder
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.tokenizer.haar import HaarTokenizer
from tests.inference.diffusion.small import SMALL, golden_network, write_released
from tests.inference.models import NO_GROUP, random_weights

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
@torch.no_grad()
def test_golden(shared_dir: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, allowed: float) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    golden = torch.load(shared_dir / "golden" / "diffusion_decoder.pt", weights_only=True)
    network = golden_network(golden).to(CUDA, dtype)
    for case in golden["forward"]:
        latent, tokens, text = (case[key].to(CUDA) for key in ("x", "tokens", "crossattn_emb"))
        mask = case["padding_mask"].to(CUDA)
        output = network(latent, tokens[0].long(), text, case["c_noise"], fps=case["fps"], padding_mask=mask)
        difference = output.float().cpu() - case["output"]
        worst, relative = difference.abs().max().item(), (difference.norm() / case["output"].norm()).item()
        print(f"{case['name']} {dtype}: at most {worst:.1e} off, relative {relative:.1e}")
        assert (worst if dtype == torch.float32 else relative) < allowed


@torch.no_grad()
def test_flash_attention_4_agrees_with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flash_attn.cute", reason="the extra `flash` is not installed")
    torch.manual_seed(0)
    layer = attention.Attention(512, 512, 4).to(CUDA, torch.bfloat16)
    layer.to_q[1].weight.fill_(1.0)
    layer.to_k[1].weight.fill_(1.0)
    x = torch.randn(2, 1300, 512, device=CUDA, dtype=torch.bfloat16)
    assert attention._suits_flash_attention(x) and attention._flash_attention() is not None
    made = layer(x.clone())
    monkeypatch.setattr(attention, "_flash_attention", lambda: None)
    torch.testing.assert_close(made, layer(x.clone()), atol=0.004, rtol=0.02)


@torch.no_grad()
def test_kernels() -> None:
    """In bfloat16 and at the release's widths, against float32."""
    draw = torch.Generator(CUDA).manual_seed(0)
    heads, gain, angles, x, matrix, row = (
        torch.randn(shape, device=CUDA, generator=draw).bfloat16()
        for shape in ((2, 300, 32, 128), (128,), (300, 1, 64), (2, 301, 4096), (4096, 16384), (3, 4096))
    )
    for rotary in ((angles.float().cos(), angles.float().sin()), None):
        exact = attention._norm_heads(
            heads.float().cpu(), gain.float().cpu(), rotary and tuple(t.cpu() for t in rotary)
        )
        made = kernels.norm_heads(heads.clone(), gain, rotary, 1e-6).float().cpu()
        torch.testing.assert_close(made, exact, atol=0.01, rtol=0.01)
    exact = torch.nn.functional.layer_norm(x.float(), (4096,), 1 + row[0].float(), row[1].float(), 1e-6)
    torch.testing.assert_close(kernels.modulated_norm(x, row[1], row[0], 1e-6).float(), exact, atol=0.01, rtol=0.01)
    assert torch.equal(kernels.scale_rows(matrix, row[2]), matrix * row[2][:, None])


@torch.no_grad()
def test_compiled_rounding() -> None:
    x = torch.randn(2, 300, 512, device=CUDA, dtype=torch.bfloat16)
    shift, scale = torch.randn(2, 512, device=CUDA, dtype=torch.bfloat16)
    for made, (data, factor) in (
        (fp8.with_gelu(torch.nn.Identity(), x), fp8._gelu_and_round(x)),
        (fp8.modulated_norm(x, shift, scale, 1e-6), fp8._norm_and_round(x, shift, scale, 1e-6)),
    ):
        assert made.data.is_contiguous() and made.scale.shape == (2, 300, 1)
        torch.testing.assert_close(made.scale, factor, atol=0, rtol=0.01)
        torch.testing.assert_close(made.data.float() * made.scale, data.float() * factor, atol=0.01, rtol=0.13)


@torch.no_grad()
def test_gelu_inside_the_product() -> None:
    layer = torch.nn.Linear(512, 1024, bias=False).to(CUDA, torch.bfloat16)
    x = torch.randn(2, 300, 512, device=CUDA, dtype=torch.bfloat16)
    exact = torch.nn.functional.gelu(x.double() @ layer.weight.double().t())
    fused, apart = network._with_gelu(layer, x), torch.nn.functional.gelu(layer(x))
    assert fused.shape == (2, 300, 1024)
    errors = [((made.double() - exact).norm() / exact.norm()).item() for made in (fused, apart)]
    print(f"GELU inside the product is {errors[0]:.1e} off, after it {errors[1]:.1e}")
    assert errors[0] < errors[1]


@torch.no_grad()
def test_8_bit_products() -> None:
    layer = torch.nn.Linear(1024, 2048, bias=False).bfloat16()
    x = torch.randn(2, 300, 1024).bfloat16()
    exact = layer.float()(x.float())
    made = fp8.Fp8Linear(layer.to(CUDA, torch.bfloat16))(x.to(CUDA))
    assert made.shape == (2, 300, 2048) and made.dtype == torch.bfloat16
    slow = fp8.Fp8Linear(layer.cpu())(x)
    rounding, error = ((part.float().cpu() - exact).norm() / exact.norm() for part in (slow, made))
    print(f"relative error of 8-bit products: {error:.4f}, of exact sums of the same numbers {rounding:.4f}")
    assert error < 1.1 * rounding + 0.002


def test_decoder_and_offloading(tmp_path: Path) -> None:
    folder = write_released(tmp_path)
    ids = torch.randint(SMALL.vocab_size, (5, 2, 3))
    exact = DiffusionDecoder.from_folder(folder, torch.device("cpu")).decode(ids)
    decoder = DiffusionDecoder.from_folder(folder, CUDA)
    video = decoder.decode(ids)
    assert video.is_cuda and video.shape == exact.shape
    error = ((video.cpu() - exact).norm() / exact.norm()).item()
    print(f"bfloat16 frames are {error:.3f} off")
    assert error < 0.1
    parked = DiffusionDecoder.from_folder(folder, CUDA, offload=True)
    torch.testing.assert_close(parked.decode(ids), video, atol=0.02, rtol=0)
    assert all(not parameter.untyped_storage().nbytes() for parameter in parked.network.parameters())
    rounded = DiffusionDecoder.from_folder(folder, CUDA, fp8=True, offload=True)
    error = ((rounded.decode(ids).cpu() - exact).norm() / exact.norm()).item()
    print(f"FP8 frames are {error:.3f} off")
    assert error < 0.2
    assert all(not buffer.untyped_storage().nbytes() for buffer in rounded.network.buffers())


def test_generation_with_a_prompt_and_everything_offloaded(tmp_path: Path) -> None:
    """Model, tokenizer and decoder take turns on the GPU; the frames are the decoder's, of the generated ids."""
    folder = write_released(tmp_path, replace(SMALL, vocab_size=64000, text_channels=1024))
    arch = ModelArch(num_layers=2, hidden_size=4096, embedding_size=64064, context_size=1024)
    layout = VideoLayout(17, (3, 2, 4), True, 25, 7)
    text = torch.randn(2, 512, 1024, generator=torch.Generator().manual_seed(1)).bfloat16()
    given = torch.rand(2, 3, 9, 32, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    decoder = DiffusionDecoder.from_folder(folder, CUDA)
    ids = []
    for offload in (False, True):
        weights = random_weights(arch, device="cuda", dtype=torch.bfloat16)
        maker = DiffusionDecoder.from_folder(folder, CUDA, offload=True) if offload else decoder
        network = CachedNetwork(weights, arch, layout, NO_GROUP)
        pipeline = VideoPipeline(network, lambda: HaarTokenizer(17), offload, offload, maker)
        made = pipeline.continue_videos(given, SamplingOptions(1.0, 0.8), [3, 4], num_frames=20, text=text)
        ids.append(torch.stack([video.ids[0] for video in made]))
        for row, video in enumerate(made):
            assert not video.video.is_cuda and video.video.shape == (3, 20, 32, 64)
            expected = decoder.decode(video.ids[0], text[row : row + 1], seed=3 + row).cpu()
            torch.testing.assert_close(video.video[:, :17], expected, atol=0.02, rtol=0)
    assert torch.equal(*ids)
