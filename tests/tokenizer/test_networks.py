"""Our networks against the original's numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_mcore.tokenizer import wavelet
from cosmos_mcore.tokenizer.causal_layers import FrameNorm
from cosmos_mcore.tokenizer.dv8x16x16 import ReleasedTokenizer
from cosmos_mcore.tokenizer.fsq import ids_to_codes, quantize
from cosmos_mcore.tokenizer.networks import DV8X16X16, Decoder, Encoder, NetworkSize
from tests.tokenizer.released import SMALL, EncoderFile, seeded

ENCODER_PARAMETERS, DECODER_PARAMETERS = 45_537_158, 65_361_136  # spec/tokenizer.md section 2


def load(golden, size):
    state = {name: tensor.float() for name, tensor in golden["state_dict"].items()}
    encoder, decoder = Encoder(size), Decoder(size)
    encoder.load_state_dict({n: t for n, t in state.items() if n.startswith(("encoder.", "quant_conv."))})
    decoder.load_state_dict({n: t for n, t in state.items() if n.startswith(("decoder.", "post_quant_conv."))})
    return (network.requires_grad_(False).to(memory_format=torch.channels_last_3d) for network in (encoder, decoder))


@pytest.mark.parametrize(
    ("file", "compression", "latents"), [("video_tokenizer.pt", 16, 6), ("continuous_tokenizer.pt", 8, 16)]
)
def test_golden(shared_dir, file, compression, latents):
    golden = torch.load(shared_dir / "golden" / file, weights_only=True)
    encoder, decoder = load(golden, NetworkSize(compression, latents, golden["config"]["channels"]))
    for case in golden["cases"]:
        latent = encoder(case["input"])
        torch.testing.assert_close(latent, case["latent"], atol=1e-4, rtol=0)
        codes = latent
        if latents == 6:
            assert torch.equal(quantize(latent), case["indices"])
            codes = ids_to_codes(case["indices"])
            assert torch.equal(codes, case["codes"])
        torch.testing.assert_close(decoder(codes), case["reconstruction"], atol=1e-4, rtol=0)


def test_golden_chunks_and_jit_names(shared_dir, tmp_path, monkeypatch):
    """The tokenizer as a whole, from state dicts with the names and constants of the released files."""
    golden = torch.load(shared_dir / "golden" / "video_tokenizer.pt", weights_only=True)
    files = {"encoder.jit": golden["encoder_jit_state_dict"], "decoder.jit": golden["decoder_jit_state_dict"]}
    monkeypatch.setattr("cosmos_mcore.tokenizer.dv8x16x16.read_jit_weights", lambda path: files[path.name])
    tokenizer = ReleasedTokenizer(tmp_path, golden["two_chunks"]["chunk_frames"], torch.device("cpu"))
    video = golden["cases"][0]["input"]
    assert torch.equal(tokenizer.encode(torch.cat([video, video.flip(2)], 2)), golden["two_chunks"]["indices"])
    decoded = tokenizer.decode(golden["cases"][0]["indices"])
    torch.testing.assert_close(decoded, golden["cases"][0]["reconstruction"], atol=1e-4, rtol=0)


def test_released_size():
    with torch.device("meta"):
        encoder, decoder = Encoder(DV8X16X16), Decoder(DV8X16X16)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == ENCODER_PARAMETERS
    assert sum(parameter.numel() for parameter in decoder.parameters()) == DECODER_PARAMETERS


@settings(max_examples=10)
@given(frames=st.integers(0, 4), height=st.integers(1, 3), width=st.integers(1, 3), seed=st.integers(0, 99))
def test_patching_is_invertible_and_its_first_band_is_the_mean(frames, height, width, seed):
    draw = torch.Generator().manual_seed(seed)
    video = torch.rand(2, 3, 1 + 4 * frames, 4 * height, 4 * width, generator=draw) * 2 - 1
    bands = wavelet.patch(video)
    assert bands.shape == (2, 192, 1 + frames, height, width)
    torch.testing.assert_close(wavelet.unpatch(bands), video, atol=1e-5, rtol=0)
    means = torch.nn.functional.avg_pool3d(video[:, :, 1:], 4) if frames else bands[:, :3, 1:]
    torch.testing.assert_close(bands[:, :3, 1:], means, atol=1e-5, rtol=0)


def test_patching_is_float32_whatever_the_input():
    video = (torch.rand(1, 3, 5, 8, 8) * 2 - 1).bfloat16()
    assert wavelet.patch(video).dtype == torch.float32
    assert torch.equal(wavelet.patch(video), wavelet.patch(video.float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_is_torchs_per_frame(dtype):
    norm = seeded(FrameNorm(6)).to(dtype)
    video = (torch.randn(2, 6, 3, 4, 5) * 3 + 20).to(dtype)
    expected = norm.norm(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 3)).transpose(1, 2)
    tolerance = 2e-4 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(norm(video), expected, atol=tolerance, rtol=0)
    assert norm(video).dtype == dtype


class Layouts(TorchDispatchMode):
    """Notes convolutions whose video or weight does not lie channels last; on GPUs that costs most of the time."""

    def __init__(self):
        super().__init__()
        self.seen, self.wrong = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.seen += 1
            if not all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in args[:2]):
                self.wrong.append([(tuple(tensor.shape), tensor.stride()) for tensor in args[:2]])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frames", [9, 17])
def test_everything_lies_channels_last(frames):
    networks = (Encoder(SMALL), Decoder(SMALL))
    inputs = (torch.rand(1, 3, frames, 48, 64), torch.rand(1, 6, (frames + 7) // 8, 3, 4))
    for network, tensor in zip(networks, inputs, strict=True):
        network.requires_grad_(False).to(memory_format=torch.channels_last_3d)
        with Layouts() as layouts:
            network(tensor)
        assert layouts.seen > 50
        attention_outputs = 1  # of the attention within frames; small
        assert len(layouts.wrong) <= attention_outputs, layouts.wrong


def test_bfloat16_and_memory_format_change_little():
    encoder = seeded(EncoderFile(SMALL))
    video = torch.rand(1, 3, 9, 32, 48) * 2 - 1
    latent = Encoder.forward(encoder, video)
    same = Encoder.forward(encoder.to(memory_format=torch.channels_last_3d), video)
    torch.testing.assert_close(same, latent, atol=1e-4, rtol=1e-4)
    rounded = Encoder.forward(encoder.to(torch.bfloat16), video)
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() - latent).norm() / latent.norm()) < 0.1
