"""Files of ``torch.save``, written and read tensor by tensor."""

import gc
import itertools
import os
import pickle
import sys
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_mcore.checkpoint.checksums import check_archive
from cosmos_mcore.checkpoint.safetensors_file import SafetensorsWriter
from cosmos_mcore.checkpoint.torch_file import TensorSpec, TorchFile, TorchFileWriter, load_bytes

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]

tensors = st.builds(
    lambda shape, dtype, seed: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(dtype),
    st.lists(st.integers(0, 5), max_size=3),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
)
plain = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5)
structures = st.recursive(
    plain | tensors,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9) | st.integers(), inner, max_size=4),
    max_leaves=12,
)


def leaves(content):
    """All tensors, in order."""
    if isinstance(content, torch.Tensor):
        return [content]
    values = content.values() if isinstance(content, dict) else content if isinstance(content, list) else []
    return [tensor for value in values for tensor in leaves(value)]


def specs(content):
    """The same structure with specs for tensors."""
    if isinstance(content, torch.Tensor):
        return TensorSpec(tuple(content.shape), content.dtype)
    if isinstance(content, dict):
        return {key: specs(value) for key, value in content.items()}
    return [specs(value) for value in content] if isinstance(content, list) else content


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def write(path, content):
    with TorchFileWriter(path, specs(content)) as writer:
        for tensor in leaves(content):
            writer.write(tensor)


@settings(max_examples=40)
@given(structures)
def test_torch_reads_what_is_written(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "written.pt"
    write(path, content)
    for mmap in (False, True):
        assert same(torch.load(path, weights_only=True, mmap=mmap), content)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


@settings(max_examples=40)
@given(structures)
def test_what_torch_writes_is_read(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "torch.pt"
    torch.save(content, path)
    file = TorchFile(path)
    assert same(file.content, content)
    for tensor in leaves(file.content):
        file.check(tensor, "x")


def in_pieces(draw, tensor):
    """Cuts a tensor at random rows."""
    if tensor.dim() == 0 or tensor.size(0) == 0:
        return [tensor]
    cuts = draw(st.lists(st.integers(1, tensor.size(0)), max_size=3, unique=True))
    edges = [0, *sorted({*cuts} - {tensor.size(0)}), tensor.size(0)]
    return [tensor[first:last] for first, last in itertools.pairwise(edges)]


@settings(max_examples=40)
@given(st.data(), st.dictionaries(st.text("ab", max_size=3), tensors, max_size=4))
@pytest.mark.parametrize("writer_of", [TorchFileWriter, SafetensorsWriter])
def test_pieces_make_the_same_file_as_whole_tensors(tmp_path_factory, writer_of, data, content):
    whole, pieces = (tmp_path_factory.getbasetemp() / name for name in ("whole", "pieces"))
    with writer_of(whole, specs(content)) as one, writer_of(pieces, specs(content)) as other:
        for tensor in content.values():
            one.write(tensor)
            for piece in in_pieces(data.draw, tensor):
                other.write(piece)
    assert pieces.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("writer_of", [TorchFileWriter, SafetensorsWriter])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([torch.ones(4, 2)], "more rows"),
        ([torch.ones(2, 2), torch.ones(2, 2)], "more rows"),
        ([torch.ones(2, 3)], "expected"),
        ([torch.ones(3, 2).half()], "expected"),
        ([torch.ones(2)], "expected"),
        ([torch.ones(2, 2)], "tensors are missing"),
        ([], "tensors are missing"),
    ],
)
def test_writers_take_only_what_was_announced(tmp_path, writer_of, rows, message):
    with (
        pytest.raises(AssertionError, match=message),
        writer_of(tmp_path / "x", {"x": TensorSpec((3, 2), torch.float32)}) as writer,
    ):
        for row in rows:
            writer.write(row)


@settings(max_examples=40)
@given(tensors, st.integers(1, 7))
def test_blocks_joined_are_the_tensor(tmp_path_factory, tensor, rows):
    path = tmp_path_factory.getbasetemp() / "blocks.pt"
    torch.save([tensor, tensor.t() if tensor.dim() == 2 else tensor], path)
    file = TorchFile(path)
    for stored in file.content:  # the second is a view of the first one's storage
        blocks = list(file.blocks(stored, "x", rows))
        assert all(block.size(0) <= rows for block in blocks if block.dim())
        assert same(torch.cat(blocks) if tensor.dim() else blocks[0], stored)
    assert not file._unchecked


def test_tensors_are_aligned_and_equal_content_gives_equal_files(tmp_path):
    content = {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(5), "c": torch.ones(7, dtype=torch.bfloat16)}
    write(tmp_path / "one.pt", content)
    write(tmp_path / "two.pt", content)
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "two.pt").read_bytes()
    for record in zipfile.ZipFile(tmp_path / "one.pt").infolist():
        if "/data/" in record.filename:
            data = (tmp_path / "one.pt").read_bytes()
            start = (
                record.header_offset
                + 30
                + len(record.filename)
                + int.from_bytes(data[record.header_offset + 28 : record.header_offset + 30], "little")
            )
            assert start % 64 == 0


def test_views_of_one_storage_are_read_and_checked_once(tmp_path):
    whole = torch.arange(24.0).view(4, 6)
    torch.save({"rows": whole[:2], "columns": whole[:, 3:]}, tmp_path / "views.pt")
    file = TorchFile(tmp_path / "views.pt")
    assert torch.equal(file.content["columns"], whole[:, 3:]) and not file.content["columns"].is_contiguous()
    file.check(file.content["rows"], "rows")
    assert not file._unchecked


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({f"tensor{i}": torch.full((1000,), float(i)) for i in range(5)}, path)
    return path


def test_a_flipped_bit_is_found_and_named(model):
    data = bytearray(model.read_bytes())
    start = data.find(torch.full((4,), 3.0).numpy().tobytes())
    data[start + 1234] ^= 1
    model.write_bytes(data)
    file = TorchFile(model)
    for i in (0, 1, 2, 4):
        file.check(file.content[f"tensor{i}"], f"tensor{i}")
    for _ in range(2):  # no second try makes it right
        with pytest.raises(ValueError, match=r"model\.pt is corrupted: tensor3 does not match its checksum"):
            file.check(file.content["tensor3"], "tensor3")
    blocks = file.blocks(file.content["tensor3"], "tensor3", 300)
    with pytest.raises(ValueError, match=r"model\.pt is corrupted: tensor3 does not match its checksum"):
        list(blocks)
    assert len(list(file.blocks(file.content["tensor2"], "tensor2", 300))) == 4


def test_a_flipped_bit_in_what_is_no_tensor_is_found(tmp_path):
    """In an optimizer's hyperparameters it would go unnoticed, in names and shapes it would confuse torch."""
    torch.save({"lr": 0.125, "iteration": 123456, "w": torch.ones(100)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        start = archive.getinfo("x/data.pkl").header_offset
        length = archive.getinfo("x/data.pkl").file_size
    data = (tmp_path / "x.pt").read_bytes()
    start = data.find(b"\x80\x02}", start)
    for position in range(start, start + length):
        (tmp_path / "x.pt").write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match=r"x\.pt is (truncated|refused|corrupted)"):
            TorchFile(tmp_path / "x.pt")


@pytest.mark.parametrize("kept", [0, 10, 1000, -1])
def test_a_truncated_file_is_one_line(model, kept):
    model.write_bytes(model.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.pt is truncated or is not a file of torch.save") as error:
        TorchFile(model)
    assert "\n" not in str(error.value)


def test_what_is_no_torch_file(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="is truncated or is not a file of torch.save"):
        TorchFile(tmp_path / "text.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(ValueError, match="is truncated or is not a file of torch.save"):
        TorchFile(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="cannot be read: No such file or directory"):
        TorchFile(tmp_path / "nowhere.pt")


class Trap:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("content", [Trap(), {"model": {"w": Trap()}}, {"w": torch.ones(1), "x": Trap}])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "trap.pt")
    with pytest.raises(
        ValueError, match=r"trap\.pt is refused: it holds Python objects .*that could run code"
    ) as error:
        TorchFile(tmp_path / "trap.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_one_error(monkeypatch):
    """Nothing is tried again when the half-written archive is thrown away."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    tensor = torch.arange(1000)
    with (
        open("/dev/full", "wb", buffering=0) as file,
        pytest.raises(OSError, match="No space left"),
        TorchFileWriter.inside(file, tensor) as writer,
    ):
        writer.write(tensor)
    gc.collect()
    assert ignored == []


def test_archives_inside_files(tmp_path):
    torch.save(torch.arange(1000), tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    assert torch.equal(load_bytes(data, "x"), torch.arange(1000))
    broken = data.replace(torch.arange(100, 200).numpy().tobytes(), torch.arange(101, 201).numpy().tobytes())
    assert broken != data
    for damaged in (broken, data[:-5], b"", pickle.dumps(Trap())):
        with pytest.raises(ValueError, match="^y is corrupted"):
            load_bytes(damaged, "y")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA, 9])
def test_a_record_that_looks_compressed_is_damaged(tmp_path, method):
    torch.save(torch.arange(1000), tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    place = data.rfind(b"PK\x01\x02", 0, data.rfind(b"x/data/0"))
    data[place + 10] = method
    with pytest.raises(ValueError, match="^y is corrupted"):
        load_bytes(bytes(data), "y")
    with pytest.raises(ValueError, match=r"f is damaged: its bytes do not match their checksum"):
        check_archive(bytes(data), tmp_path / "f")
