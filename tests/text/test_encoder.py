"""The text encoder against transformers used as its documentation says, and what it refuses."""

import json
import os
import pickle
import shutil
import sys

import pytest
import safetensors.torch
import torch

from cosmos_mcore.text.encoder import TextEncoder, fingerprint_of
from tests.text.models import write_tiny_t5

CPU = torch.device("cpu")
PROMPTS = ["The robot arm lifts a red box.", "", "rain", "a car turns left and the sun " * 200]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_t5(tmp_path_factory.mktemp("t5") / "google-t5" / "t5-11b")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(folder, dtype=torch.float32):
    return TextEncoder.from_folder(folder, CPU, dtype)


def refused(folder):
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_semantics(folder, caplog):
    """spec/inference.md section 9: padded and cut to 512, rows from the prompt's length on are zero."""
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    batch = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=512, return_tensors="pt")
    model = transformers.T5EncoderModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    lengths = batch.attention_mask.sum(dim=1).tolist()
    assert lengths[1:] == [1, 2, 512] and 7 < lengths[0] < 30
    for row, length in zip(expected, lengths, strict=True):
        row[length:] = 0
    found = load(folder)(PROMPTS)
    assert found.shape == (4, 512, 1024) and found.dtype == torch.float32 and not found.requires_grad
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(found == 0, expected == 0)
    # Neighbours in a batch change nothing but the last bits, and bf16 no more than its precision.
    alone = load(folder)(PROMPTS[:1])
    assert torch.allclose(alone, expected[:1], atol=1e-5)
    rounded = TextEncoder.from_folder(folder, CPU)(PROMPTS)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).norm() < 0.03 * expected.norm()
    cut = [record.getMessage() for record in caplog.records if record.name == "cosmos_mcore.text.encoder"]
    assert len(cut) == 2 and cut[0].startswith("a prompt has more than 512 tokens; cut off: a car turns left")


def test_every_kind_of_file_gives_the_same(folder, tmp_path):
    import transformers

    expected = load(folder)(PROMPTS[:1])
    whole = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    for kind in ("bin", "old bin", "shards"):
        other = tmp_path / kind
        other.mkdir()
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(folder / name, other / name)
        if kind == "shards":
            whole.save_pretrained(other, max_shard_size="100KB")
            assert len(list(other.glob("*.safetensors"))) > 1
        else:
            zipped = kind == "bin"
            torch.save(whole.state_dict(), other / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        assert torch.equal(load(other)(PROMPTS[:1]), expected), kind


def test_fingerprint(folder, copy, tmp_path):
    found = load(folder).fingerprint
    assert found == fingerprint_of(folder, torch.float32) == fingerprint_of(copy, torch.float32)
    assert len(found) == 32
    others = {found, fingerprint_of(folder), fingerprint_of(write_tiny_t5(tmp_path / "other", seed=1), torch.float32)}
    assert len(others) == 3
    (copy / "config.json").write_text(json.dumps({**json.loads((copy / "config.json").read_text()), "note": "moved"}))
    assert fingerprint_of(copy, torch.float32) == found
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1000] ^= 64
    (copy / "model.safetensors").write_bytes(weights)
    others.add(fingerprint_of(copy, torch.float32))
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace("-9.0", "-8.0"))
    others.add(fingerprint_of(copy, torch.float32))
    assert len(others) == 5


def test_no_code_in_a_pickle_is_run(copy, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    (copy / "model.safetensors").unlink()
    for data in (pickle.dumps({"shared.weight": Bomb()}), b"no pickle at all"):
        (copy / "pytorch_model.bin").write_bytes(data)
        assert "holds no complete T5 model" in refused(copy)
    torch.save({"shared.weight": Bomb()}, copy / "pytorch_model.bin")
    assert "holds no complete T5 model" in refused(copy)
    assert not (tmp_path / "harmed").exists()


def test_mistakes(copy, tmp_path, monkeypatch):
    download = "download google-t5/t5-11b with scripts/download_autoregressive_checkpoints.py"
    missing = refused(tmp_path / "nowhere")
    assert f"there is no text encoder in {tmp_path / 'nowhere'} (config.json is missing); {download}" in missing
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        assert "install the text extra: pip install '.[text]'" in refused(copy)
    whole = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(whole[:-10])
    assert "holds no complete T5 model" in refused(copy)
    (copy / "model.safetensors").unlink()
    assert f"has no weights (model.safetensors or pytorch_model.bin); {download}" in refused(copy)
    tensors = safetensors.torch.load(whole)
    del tensors["encoder.final_layer_norm.weight"]
    torch.save(tensors, copy / "pytorch_model.bin")
    assert "lacks 1 of the text encoder's weights, for example encoder.final_layer_norm.weight" in refused(copy)
    (copy / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is damaged" in refused(copy)
    (copy / "config.json").write_text('{"model_type": "t5", "d_model": 512}')
    assert "holds a t5 model of width 512; the Video2World models read T5 embeddings of width 1024" in refused(copy)
    (copy / "config.json").write_text("{")
    assert "config.json is damaged" in refused(copy)
