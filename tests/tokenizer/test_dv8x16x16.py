"""The released tokenizer from files: safe loading, both engines, fingerprints, and the errors of wrong files."""

import zipfile

import pytest
import torch

from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.tokenizer.build import build_tokenizer
from cosmos_mcore.tokenizer.dv8x16x16 import JitTokenizer, ReleasedTokenizer
from cosmos_mcore.tokenizer.jit_file import read_jit_weights
from tests.tokenizer.released import DecoderFile, EncoderFile, seeded, write_released

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("released"))


def open_eager(folder, chunk=9):
    return ReleasedTokenizer(folder, chunk, CPU)


def test_weights_are_read_with_the_names_of_the_state_dict(folder):
    for name in ("encoder.jit", "decoder.jit"):
        found, expected = read_jit_weights(folder / name), torch.jit.load(str(folder / name)).state_dict()
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype for key in found)


def test_both_engines_agree(folder):
    eager, jit = open_eager(folder), JitTokenizer(folder, 9, CPU)
    video = torch.rand(2, 3, 18, 32, 32) * 2 - 1
    ids = eager.encode(video)
    assert (ids.shape, ids.dtype) == ((2, 4, 2, 2), torch.int32)
    assert torch.equal(jit.encode(video), ids)
    assert ids.unique().numel() > 5
    torch.testing.assert_close(jit.decode(ids), eager.decode(ids), atol=1e-4, rtol=0)
    assert eager.decode(ids).shape == video.shape


def test_ids_do_not_depend_on_the_batch_and_are_causal(folder):
    tokenizer = open_eager(folder, chunk=17)
    video = torch.rand(3, 3, 17, 48, 32) * 2 - 1
    ids = tokenizer.encode(video)
    assert all(torch.equal(tokenizer.encode(video[i : i + 1]), ids[i : i + 1]) for i in range(3))
    assert torch.equal(tokenizer.encode(video[:, :, :9]), ids[:, :2])
    assert torch.equal(tokenizer.encode(video[:, :, :1]), ids[:, :1])


def test_fingerprint_names_what_ids_depend_on(folder, tmp_path):
    others = {
        open_eager(folder).fingerprint,
        open_eager(folder, chunk=17).fingerprint,
        open_eager(write_released(tmp_path / "b", encoder=seeded(EncoderFile(), 7))).fingerprint,
        JitTokenizer(folder, 9, CPU).fingerprint,
    }
    assert len(others) == 4
    # Ids do not depend on the decoder.
    same = write_released(tmp_path / "c", decoder=seeded(DecoderFile(), 7))
    assert open_eager(same).fingerprint == open_eager(folder).fingerprint


def test_config(folder):
    config = RunConfig()
    config.tokenizer.name, config.tokenizer.path, config.tokenizer.engine = "dv8x16x16", str(folder), "jit"
    assert isinstance(build_tokenizer(config, CPU), JitTokenizer)
    config.tokenizer.engine = "eager"
    assert isinstance(build_tokenizer(config, CPU), ReleasedTokenizer)


def rewrite(source, target, change):
    """Copies an archive with ``change(name, data)`` applied to each record (None leaves it out)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None:
                new.writestr(name, data)
    return target


def test_code_in_the_pickle_is_refused_and_not_run(folder, tmp_path):
    ran = tmp_path / "ran"
    attack = b"cos\nsystem\n(S'touch %b'\ntR." % str(ran).encode()
    path = rewrite(
        folder / "encoder.jit", tmp_path / "e.jit", lambda name, data: attack if name.endswith("data.pkl") else data
    )
    with pytest.raises(ValueError, match=r"e\.jit is refused: it names os\.system, which could run code"):
        read_jit_weights(path)
    assert not ran.exists()


def test_damaged_files(folder, tmp_path):
    path = tmp_path / "encoder.jit"
    with pytest.raises(ValueError, match=r"there is no file .*encoder\.jit; tokenizer\.path must be the folder"):
        open_eager(tmp_path)
    whole = (folder / "encoder.jit").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is damaged"):
        read_jit_weights(path)
    with pytest.raises(ValueError, match="no complete TorchScript file"):
        JitTokenizer(tmp_path, 9, CPU)
    with zipfile.ZipFile(folder / "encoder.jit") as archive:
        tensors = [info for info in archive.infolist() if "/data/" in info.filename]
        record = max(tensors, key=lambda info: info.file_size)
    position = record.header_offset + record.file_size // 2  # inside the largest tensor
    path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    with pytest.raises(ValueError, match="is damaged"):
        read_jit_weights(path)
    names = whole.rindex(b"PK\x01\x02") + 46  # the table of contents ends with this entry's name
    path.write_bytes(whole[:names] + b"\xff" + whole[names + 1 :])
    with pytest.raises(ValueError, match=r"encoder\.jit is damaged"):
        read_jit_weights(path)
    rewrite(folder / "encoder.jit", path, lambda name, data: data[:8] if name.endswith("/data/3") else data)
    with pytest.raises(ValueError, match="record 3 has 8 bytes"):
        read_jit_weights(path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is not a TorchScript file"):
        read_jit_weights(path)


def test_another_tokenizers_file(folder, tmp_path):
    (tmp_path / "encoder.jit").write_bytes((folder / "decoder.jit").read_bytes())
    with pytest.raises(ValueError, match=r"has no tensor encoder\.norm_out\.norm\.weight; it is not the file"):
        open_eager(tmp_path)
