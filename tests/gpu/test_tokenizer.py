"""The released tokenizer on a GPU: float32 against the original's numbers, bfloat16 against float32, CUDA graphs."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cosmos_mcore.tokenizer.dv8x16x16 import JitTokenizer, ReleasedTokenizer
from cosmos_mcore.tokenizer.fsq import ids_to_codes, quantize
from cosmos_mcore.tokenizer.networks import NetworkSize
from tests.tokenizer.released import write_released
from tests.tokenizer.test_networks import load

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def test_golden_in_float32(shared_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    golden = torch.load(shared_dir / "golden" / "video_tokenizer.pt", weights_only=True)
    encoder, decoder = (one.to(CUDA) for one in load(golden, NetworkSize(16, 6, golden["config"]["channels"])))
    for case in golden["cases"]:
        latent = encoder(case["input"].to(CUDA))
        torch.testing.assert_close(latent.cpu(), case["latent"], atol=1e-4, rtol=0)
        assert torch.equal(quantize(latent).cpu(), case["indices"])
        decoded = decoder(ids_to_codes(case["indices"].to(CUDA)))
        torch.testing.assert_close(decoded.cpu(), case["reconstruction"], atol=1e-4, rtol=0)


def test_bfloat16(shared_dir: Path) -> None:
    golden = torch.load(shared_dir / "golden" / "video_tokenizer.pt", weights_only=True)
    encoder, decoder = load(golden, NetworkSize(16, 6, golden["config"]["channels"]))
    encoder, decoder = (one.to(CUDA, torch.bfloat16) for one in (encoder, decoder))
    for case in golden["cases"]:
        latent = encoder(case["input"].to(CUDA)).float().cpu()
        error = ((latent - case["latent"]).norm() / case["latent"].norm()).item()
        decoded = decoder(ids_to_codes(case["indices"].to(CUDA))).cpu()
        equal = (quantize(latent) == case["indices"]).float().mean().item()
        worse = ((decoded - case["reconstruction"]).norm() / case["reconstruction"].norm()).item()
        print(f"{case['name']}: latents {error:.4f} off, {100 * equal:.0f} % of ids equal, frames {worse:.4f} off")
        assert error < 0.03 and worse < 0.03


def test_graphs_give_the_same_ids_from_many_threads(tmp_path: Path) -> None:
    tokenizer = ReleasedTokenizer(write_released(tmp_path), 9, CUDA)
    videos = [torch.rand(1, 3, frames, 32, 48, device=CUDA) * 2 - 1 for frames in (9, 1, 9, 9) * 8]
    expected = [quantize(tokenizer._encoder(video)) for video in videos]
    stream_of = [torch.cuda.Stream() for _ in range(4)]

    def encode(number: int) -> torch.Tensor:
        stream_of[number % 4].wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream_of[number % 4]):
            return tokenizer.encode(videos[number]).cpu()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(encode, range(len(videos))))
    assert all(torch.equal(ids, other.cpu()) for ids, other in zip(found, expected, strict=True))


def test_a_dropped_tokenizer_leaves_no_memory(tmp_path: Path) -> None:
    folder, held = write_released(tmp_path), []
    video = torch.rand(1, 3, 9, 64, 64, device=CUDA) * 2 - 1
    gc.disable()  # else a cycle of references would go at some time
    try:
        for _ in range(3):  # in the first round, libraries take what they keep
            ReleasedTokenizer(folder, 9, CUDA).encode(video)
            held.append(torch.cuda.memory_allocated())
    finally:
        gc.enable()
    assert held[2] == held[1]


def test_jit(tmp_path: Path) -> None:
    folder = write_released(tmp_path, device=CUDA)
    video = torch.rand(2, 3, 9, 32, 32, device=CUDA) * 2 - 1
    ids = JitTokenizer(folder, 9, CUDA).encode(video)
    assert (ids == ReleasedTokenizer(folder, 9, CUDA).encode(video)).float().mean() > 0.7  # bfloat16 and float32
