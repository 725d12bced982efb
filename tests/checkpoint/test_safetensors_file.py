"""Files in the safetensors format, against the library of that name."""

import json
import struct

import pytest
import safetensors.torch
import torch

from cosmos_mcore.checkpoint.safetensors_file import SafetensorsFile, SafetensorsWriter
from cosmos_mcore.checkpoint.torch_file import TensorSpec

CONTENT = {
    "a": torch.randn(3, 5).bfloat16(),
    "b": torch.randn(7),
    "c": torch.arange(5),
    "d": torch.tensor(2.0),
    "e": torch.zeros(0, 4),
    "f": torch.tensor([True, False]),
}


def write(path, content):
    with SafetensorsWriter(path, {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in content.items()}) as writer:
        for tensor in content.values():
            writer.write(tensor)


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path / "x.safetensors", CONTENT)
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(CONTENT)
    assert all(
        torch.equal(loaded[name], CONTENT[name]) and loaded[name].dtype == CONTENT[name].dtype for name in CONTENT
    )


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.torch.save_file(CONTENT, tmp_path / "x.safetensors", {"format": "pt"})
    loaded = SafetensorsFile(tmp_path / "x.safetensors").tensors
    assert set(loaded) == set(CONTENT)
    assert all(
        torch.equal(loaded[name], CONTENT[name]) and loaded[name].dtype == CONTENT[name].dtype for name in CONTENT
    )


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_one_line(tmp_path, kept):
    path = tmp_path / "x.safetensors"
    write(path, CONTENT)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"x.safetensors is truncated") as error:
        SafetensorsFile(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, None),
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 9]}, "x ends after the file"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}, "x ends after the file"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "x does not have as many bytes as its shape needs"),
        ({"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}, "truncated or is not a safetensors file"),
        ({"dtype": "F32", "shape": [2]}, "truncated or is not a safetensors file"),
        ([], "truncated or is not a safetensors file"),
    ],
)
def test_a_damaged_header(tmp_path, entry, message):
    header = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    if message is None:
        SafetensorsFile(tmp_path / "x.safetensors")
        return
    with pytest.raises(ValueError, match=message):
        SafetensorsFile(tmp_path / "x.safetensors")
