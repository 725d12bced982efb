"""The continuous tokenizer's decoder against the original's numbers, from files with the released names."""

import pytest
import torch

from cosmos_mcore.tokenizer.cv8x8x8 import ContinuousDecoder
from tests.inference.diffusion.small import write_continuous

CPU = torch.device("cpu")


def test_golden(shared_dir, tmp_path, monkeypatch):
    golden = torch.load(shared_dir / "golden" / "continuous_tokenizer.pt", weights_only=True)
    norm = golden["normalisation"]
    # The file has as many columns as the test's chunk; the rest of a chunk of 8 is not used.
    mean, std = (torch.nn.functional.pad(norm[key], (0, 3), value=1.0) for key in ("mean", "std"))
    torch.save((mean, std), tmp_path / "mean_std.pt")
    weights = {name: tensor.clone() for name, tensor in golden["decoder_jit_state_dict"].items()}
    monkeypatch.setattr("cosmos_mcore.tokenizer.cv8x8x8.read_jit_weights", lambda path: weights)
    decoder = ContinuousDecoder.from_folder(tmp_path, CPU)
    video = golden["cases"][0]
    decoded = decoder.decode(norm["model_latent"] / norm["sigma_data"])
    worst = (decoded - video["reconstruction"]).abs().max().item()
    first = decoder.decode(norm["normalised_latent"][:, :, :1])
    torch.testing.assert_close(first, video["reconstruction"][:, :, :1], atol=1e-4, rtol=0)
    other = decoder.decode(norm["other_normalised_latent"])
    print(f"{worst:.1e}, other {(other[:, :, 0] - norm['other_reconstruction_first_frame']).abs().max().item():.1e}")
    assert worst < 1e-4
    torch.testing.assert_close(other[:, :, 0], norm["other_reconstruction_first_frame"], atol=2e-4, rtol=0)
    torch.testing.assert_close(other[:, :, -1], norm["other_reconstruction_last_frame"], atol=2e-4, rtol=0)


def test_shapes_and_causality(tmp_path):
    decoder = ContinuousDecoder.from_folder(write_continuous(tmp_path), CPU)
    latent = torch.randn(1, 16, 8, 4, 6)
    video = decoder.decode(latent)
    assert (video.shape, video.dtype) == ((1, 3, 57, 32, 48), torch.float32)
    torch.testing.assert_close(decoder.decode(latent[:, :, :5]), video[:, :, :33], atol=1e-4, rtol=0)


def test_wrong_files(tmp_path):
    write_continuous(tmp_path)
    for content in (torch.zeros(16, 8), (torch.zeros(16, 7), torch.ones(16, 7)), (1.0, 2.0)):
        torch.save(content, tmp_path / "mean_std.pt")
        with pytest.raises(ValueError, match=r"mean_std\.pt does not hold mean and deviation"):
            ContinuousDecoder.from_folder(tmp_path, CPU)
    (tmp_path / "mean_std.pt").unlink()
    with pytest.raises(ValueError, match=r"there is no file \S+mean_std\.pt"):
        ContinuousDecoder.from_folder(tmp_path, CPU)
