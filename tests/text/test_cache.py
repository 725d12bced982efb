"""Embeddings on disk: as the encoder gave them, made once, never taken from a damaged file or another encoder."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.text.cache import EmbeddingCache
from tests.processes import ROOT, environment
from tests.text.models import DrawnEncoder, drawn_embedding


def never():
    raise AssertionError("the encoder is not needed")


def files(folder):
    return sorted(folder.rglob("*.safetensors"))


@given(prompts=st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=20))
def test_what_comes_out_is_what_the_encoder_gave(tmp_path_factory, prompts):
    folder, encoder = tmp_path_factory.mktemp("cache"), DrawnEncoder()
    expected = torch.stack([drawn_embedding(prompt) for prompt in prompts])
    assert EmbeddingCache(folder).missing(prompts) == list(dict.fromkeys(prompts))
    found = EmbeddingCache(folder).embed(prompts, lambda: encoder)
    assert torch.equal(found, expected) and found.dtype == torch.bfloat16
    assert sorted(encoder.encoded) == sorted(set(prompts))
    again = EmbeddingCache(folder)
    assert torch.equal(again.embed(prompts, never), expected)
    assert again.missing(prompts) == [] and all(prompt in again for prompt in prompts)
    assert len(files(folder)) == len(set(prompts))


def test_only_what_is_missing_is_encoded_and_zeros_are_not_kept(tmp_path):
    first, second = DrawnEncoder(), DrawnEncoder()
    EmbeddingCache(tmp_path).embed(["rain", "sun"], lambda: first)
    prompts = ["rain", "a red box", "sun", "a red box"]
    assert EmbeddingCache(tmp_path).read("a red box") is None
    EmbeddingCache(tmp_path).embed(prompts, lambda: second)
    assert second.encoded == ["a red box"]
    assert all(path.stat().st_size < 2048 * 10 + 500 for path in files(tmp_path))


def test_long_lists_are_encoded_in_batches(tmp_path):
    sizes = []

    class Counting(DrawnEncoder):
        def __call__(self, prompts):
            sizes.append(len(prompts))
            return super().__call__(prompts)

    prompts = [str(number) for number in range(40)]
    EmbeddingCache(tmp_path).embed(prompts, Counting)
    assert sizes == [16, 16, 8]


def test_another_encoders_embeddings_are_refused(tmp_path):
    EmbeddingCache(tmp_path / "a").embed(["rain"], DrawnEncoder)
    EmbeddingCache(tmp_path / "a", "drawn")
    with pytest.raises(ValueError, match=r"were made by another text encoder; name another folder, or delete it$"):
        EmbeddingCache(tmp_path / "a", "other")
    with pytest.raises(ValueError, match="were made by another text encoder"):
        EmbeddingCache(tmp_path / "a").embed(["sun"], lambda: DrawnEncoder("other"))
    assert len(files(tmp_path)) == 1
    # Files copied from another encoder's folder do not count.
    other = EmbeddingCache(tmp_path / "b", "other")
    other.embed(["sun"], lambda: DrawnEncoder("other"))
    (source,), target = files(tmp_path / "a"), tmp_path / "b"
    (target / source.parent.name).mkdir(exist_ok=True)
    (target / source.parent.name / source.name).write_bytes(source.read_bytes())
    assert other.read("rain") is None and other.read("sun") is not None


def test_a_folder_that_does_not_say_whose_it_is_loses_nothing(tmp_path):
    EmbeddingCache(tmp_path).embed(["rain"], DrawnEncoder)
    (tmp_path / "embeddings.json").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has embeddings but no embeddings\.json, .*; copy that file, too"):
        EmbeddingCache(tmp_path).read("rain")
    (tmp_path / "elsewhere").rename(tmp_path / "embeddings.json")
    assert EmbeddingCache(tmp_path).read("rain") is not None


@given(data=st.data())
def test_a_damaged_file_is_never_read_as_good(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cache")
    cache = EmbeddingCache(folder)
    expected = cache.embed(["rain"], DrawnEncoder)[0]
    (path,) = files(folder)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), "cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.one_of(st.integers(0, 300), st.integers(0, len(content) - 1)))
            content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = cache.read("rain")
    # A flipped bit in the header's spaces, or a second flip that takes back the first, harms nothing.
    assert found is None or torch.equal(found, expected)
    assert (found is None) == (not path.exists())
    assert torch.equal(cache.embed(["rain"], DrawnEncoder)[0], expected)


def test_numbers_that_are_not_finite_are_not_kept(tmp_path):
    class Broken(DrawnEncoder):
        def __call__(self, prompts):
            return super().__call__(prompts) * float("nan")

    with pytest.raises(ValueError, match="numbers that are not finite"):
        EmbeddingCache(tmp_path).embed(["rain"], Broken)
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_or_is_none(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"embeddings\.json cannot be read \(Not a directory\); name another folder"):
        EmbeddingCache(tmp_path / "file" / "cache")
    cache = EmbeddingCache(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    cache._path("rain").parent.write_text("")
    with pytest.raises(ValueError, match=r"the folder of embeddings .* cannot be written \(File exists\)"):
        cache.embed(["rain"], DrawnEncoder)
    (tmp_path / "embeddings.json").write_text("{")
    with pytest.raises(ValueError, match=r"embeddings\.json is damaged; delete the folder"):
        EmbeddingCache(tmp_path)


def test_processes_share_a_folder_and_may_be_killed(tmp_path):
    command = [sys.executable, "-m", "tests.text.cache_worker", str(tmp_path / "cache"), str(tmp_path)]
    workers = [subprocess.Popen([*command, str(number)], cwd=ROOT, env=environment()) for number in range(3)]
    deadline = time.monotonic() + 60
    while len(files(tmp_path / "cache")) < 20 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(workers[0].pid, signal.SIGKILL)
    assert [worker.wait(60) for worker in workers] == [-signal.SIGKILL, 0, 0]
    cache = EmbeddingCache(tmp_path / "cache", "drawn")
    prompts = [f"prompt {number}" for number in range(60)]
    assert torch.equal(cache.embed(prompts, never), torch.stack([drawn_embedding(prompt) for prompt in prompts]))
    made = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2)]
    assert sum(made) >= 30  # none of them has waited for another
