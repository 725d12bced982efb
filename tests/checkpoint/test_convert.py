"""Every layout to every other: byte-exact, in bounded memory, and never half done."""

import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter

import pytest
import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from cosmos_mcore.checkpoint import torch_file
from cosmos_mcore.checkpoint.convert import LAYOUTS, convert
from cosmos_mcore.checkpoint.distributed_reader import read_metadata
from cosmos_mcore.checkpoint.hub_files import INDEX, write_safetensors
from cosmos_mcore.checkpoint.names import original_shapes, stored_tensors
from cosmos_mcore.checkpoint.original import existing_shards, open_shards
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from cosmos_mcore.checkpoint.torch_file import TensorSpec, TorchFile, TorchFileWriter
from cosmos_mcore.model.presets import PRESETS, ModelArch, Yarn
from tests.checkpoint.models import RELEASED, random_weights, reduced, save_model
from tests.processes import environment

ARCH = reduced("5b-video2world")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A ``model.pt`` as released, and its weights."""
    weights = random_weights(ARCH)
    return save_model(tmp_path_factory.mktemp("model") / "model.pt", weights), weights


def assert_holds(path, weights, layout=None):
    checkpoint = open_checkpoint(path)
    assert checkpoint.names == list(weights)
    for name, tensor in weights.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        checkpoint.release(name)
        assert torch.equal(checkpoint.read(name), tensor), name  # released pages are read again
    assert layout is None or checkpoint.layout == layout
    return checkpoint


@pytest.mark.parametrize("preset", RELEASED)
def test_the_circle_through_all_layouts_is_byte_identical(tmp_path, preset):
    weights = random_weights(reduced(preset))
    save_model(tmp_path / "released" / "model.pt", weights)
    steps = [
        ("released", "model.pt", "monolithic", {}),
        ("model.pt", "mp4.pt", "mp", {"tensor_parallel_size": 4}),
        ("mp4.pt", "distributed", "distributed", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
        ("distributed", "hub", "safetensors", {}),
        ("hub", "te.pt", "te", {}),
        ("te.pt", "te8.pt", "te", {"tensor_parallel_size": 8}),
        ("te8.pt", "mp2.pt", "mp", {"tensor_parallel_size": 2}),
        ("mp2.pt", "end.pt", "monolithic", {}),
    ]
    for source, output, to, sizes in steps:
        convert(tmp_path / source, tmp_path / output, to, **sizes)
        assert open_checkpoint(tmp_path / output).layout == to
    assert (tmp_path / "end.pt").read_bytes() == (tmp_path / "model.pt").read_bytes()
    loaded = torch.load(tmp_path / "end.pt", weights_only=True)
    assert list(loaded) == ["model." + name for name in weights]
    assert all(torch.equal(loaded["model." + name], tensor) for name, tensor in weights.items())


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("case", ["base", "yarn", "video2world"])
def test_shards_are_the_originals(golden_dir, tmp_path, case):
    content = torch.load(golden_dir / f"{case}.pt", weights_only=True)
    torch.save(content["state_dict"], tmp_path / "model.pt")
    assert content["shard_sha256"]
    for key, expected in content["shard_sha256"].items():
        size, rank = int(key[2]), int(key[-1])
        if rank == 0:
            convert(tmp_path / "model.pt", tmp_path / f"tp{size}.pt", "mp", tensor_parallel_size=size)
        shards = torch.load(tmp_path / f"tp{size}_model_mp_{rank}.pt", weights_only=True)
        found = {name: (list(tensor.shape), digest(tensor)) for name, tensor in shards.items()}
        assert found == {name: (list(shape), sha) for name, (shape, sha) in expected.items()}


def test_the_originals_shards_are_read(golden_dir, shared_dir):
    truth = torch.load(golden_dir / "base.pt", weights_only=True)["state_dict"]
    checkpoint = open_checkpoint(shared_dir / "golden" / "base.pt".replace(".pt", "_model_mp_0.pt"))
    assert checkpoint.layout == "mp" and checkpoint.tensor_parallel_size == 2
    assert all(torch.equal(checkpoint.read(name), truth["model." + name]) for name in checkpoint.names)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_oversized_shards_made_of_views_are_read(tmp_path, model, size):
    _, weights = model
    for rank in range(size):
        views = {}
        for stored in stored_tensors(ARCH, "originals"):
            tensor = weights[stored.name]
            views["model." + stored.name] = (
                tensor if stored.split_axis is None else tensor.chunk(size, stored.split_axis)[rank]
            )
        torch.save(views, tmp_path / f"model_model_mp_{rank}.pt")
    whole = sum(tensor.nbytes for tensor in weights.values())
    assert (tmp_path / "model_model_mp_0.pt").stat().st_size > whole
    assert_holds(tmp_path / "model.pt", weights, "mp")
    convert(tmp_path / "model.pt", tmp_path / "small.pt", "mp", tensor_parallel_size=size)
    norms = sum(tensor.nbytes for tensor in weights.values() if tensor.dim() == 1)
    assert (tmp_path / "small_model_mp_0.pt").stat().st_size < whole / size + norms + 100_000


def test_gate_and_up_are_joined_per_shard_in_te_files(tmp_path, model):
    path, weights = model
    convert(path, tmp_path / "te.pt", "te", tensor_parallel_size=2)
    for rank in range(2):
        content = torch.load(tmp_path / f"te_model_mp_{rank}.pt", weights_only=True)
        gate, up = (weights[f"layers.1.feed_forward.{name}.weight"].chunk(2)[rank] for name in ("w1", "w3"))
        assert torch.equal(content["model.layers.1.layernorm_mlp.fc1_weight"], torch.cat([gate, up]))
        key = weights["layers.1.attention.wk.weight"].chunk(2)[rank]
        assert torch.equal(content["model.layers.1.self_attention.layernorm_qkv.key_weight"], key)


@pytest.mark.parametrize("form", ["prefixed", "plain", "nested"])
def test_forms_of_model_pt(tmp_path, model, form):
    path, weights = model
    convert(path, tmp_path / "model.pt", "monolithic", form=form)
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    content = content["model"] if form == "nested" else content
    assert list(content)[0] == ("tok_embeddings.weight" if form == "plain" else "model.tok_embeddings.weight")
    content["model.layers.0.attention._extra_state"] = torch.ones(3)  # ignored
    torch.save({"model": content} if form == "nested" else content, tmp_path / "extra.pt")
    assert_holds(tmp_path / "model.pt", weights, "monolithic")
    assert_holds(tmp_path / "extra.pt", weights, "monolithic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(tmp_path, dtype):
    weights = random_weights(ARCH, dtype)
    save_model(tmp_path / "model.pt", weights)
    for to in ("safetensors", "distributed"):
        convert(tmp_path / "model.pt", tmp_path / to, to)
        assert_holds(tmp_path / to, weights, to)


def test_hub_folder(tmp_path, model):
    path, weights = model
    files = write_safetensors(open_checkpoint(path), tmp_path / "hub", max_file_bytes=1_000_000)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 2 and all(file.stat().st_size < 1_100_000 for file in shards)
    index = json.loads((tmp_path / "hub" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert index["weight_map"]["lm_head.weight"] == shards[-1].name
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (config["num_key_value_heads"], config["head_dim"], config["torch_dtype"]) == (8, 8, "bfloat16")
    assert_holds(tmp_path / "hub", weights, "safetensors")
    assert_holds(tmp_path / "hub" / INDEX, weights)
    shards[1].unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-.*safetensors cannot be read: No such file"):
        open_checkpoint(tmp_path / "hub")


def test_yarn_survives_in_the_hub_folder(tmp_path, model):
    arch = ModelArch(num_layers=2, hidden_size=64, ffn_hidden_size=32, kv_channels=8, yarn=Yarn(scale=4.0))
    save_model(tmp_path / "model.pt", random_weights(arch))
    checkpoint = open_checkpoint(tmp_path / "model.pt")
    checkpoint.arch = arch
    write_safetensors(checkpoint, tmp_path / "hub")
    assert open_checkpoint(tmp_path / "hub").arch == arch
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (tmp_path / "hub" / "config.json").write_text(json.dumps({**config, "head_dim": 16}))
    with pytest.raises(ValueError, match="config.json says kv_channels=16, but the tensors have another"):
        open_checkpoint(tmp_path / "hub")


def test_checkpoints_of_the_nemo_port(tmp_path):
    # Megatron's format and names, with a prefix, in a subfolder beside one that is of no use here.
    weights = random_weights(reduced("12b"))
    save_model(tmp_path / "model.pt", weights)
    convert(tmp_path / "model.pt", tmp_path / "nemo" / "weights", "distributed", tensor_parallel_size=2)
    (tmp_path / "nemo" / "context").mkdir()
    path = tmp_path / "nemo" / "weights" / ".metadata"
    metadata = read_metadata(path.parent)
    metadata.state_dict_metadata = {"module." + key: entry for key, entry in metadata.state_dict_metadata.items()}
    metadata.storage_data = {
        MetadataIndex("module." + index.fqn, index.offset): info for index, info in metadata.storage_data.items()
    }
    path.write_bytes(pickle.dumps(metadata))
    assert_holds(tmp_path / "nemo", weights, "distributed")


# What users get wrong: each is one line that says what and where.


def test_wrong_numbers_of_shards(tmp_path, model):
    path, weights = model
    convert(path, tmp_path / "x.pt", "mp", tensor_parallel_size=4)
    with pytest.raises(ValueError, match="there are 4 shards in .*; give --tensor_parallel_size 4 instead of 2"):
        open_shards(tmp_path / "x.pt", tensor_parallel_size=2)
    shards = existing_shards(tmp_path / "x.pt")
    hidden = shards[1].rename(tmp_path / "hidden.pt")
    with pytest.raises(ValueError, match="x_model_mp_1.pt is missing: found shards"):
        open_checkpoint(tmp_path / "x.pt")
    shards[3].rename(shards[1])  # the wrong shard in its place goes unnoticed by shapes, but two are missing
    with pytest.raises(ValueError, match="x_model_mp_3.pt is missing"):
        open_checkpoint(tmp_path / "x.pt")
    hidden.rename(shards[3])
    save_model(shards[2], weights)  # not a shard, but the whole model
    with pytest.raises(ValueError, match=r"x_model_mp_2.pt: \d+ misshapen: tok_embeddings.weight is \[576, 256\], not"):
        open_checkpoint(tmp_path / "x.pt")


def test_half_of_a_released_model_is_noticed(tmp_path):
    arch = PRESETS["tiny"]
    save_model(tmp_path / "m.pt", random_weights(arch))
    convert(tmp_path / "m.pt", tmp_path / "x.pt", "mp", tensor_parallel_size=2)
    (tmp_path / "x_model_mp_1.pt").unlink()
    with pytest.raises(ValueError, match="holds 1/2 of a tiny model; are shard files missing?"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layers.1.attention.wo.weight"), "1 missing: layers.1.attention.wo.weight"),
        (lambda w: w.update({"layers.1.attention.bias": torch.ones(2)}), "1 unexpected: layers.1.attention.bias"),
        (lambda w: w.update({"norm.weight": torch.ones(8)}), r"misshapen: .* not \[.*8\]"),
        (
            lambda w: w.update({"layers.2.ffn_norm.weight": torch.ones(9)}),
            r"1 misshapen: layers.2.ffn_norm.weight is \[9\]",
        ),
        (lambda w: w.update({"lr": 0.1}), "lr is a float, not a tensor"),
        (lambda w: w.clear(), "it has no tensors, but no attention.wq.weight"),
    ],
)
def test_files_with_something_else(tmp_path, model, change, message):
    weights = dict(model[1])
    change(weights)
    torch.save(weights, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message) as error:
        open_checkpoint(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(error.value) and "\n" not in str(error.value)


def test_a_corrupted_tensor_stops_the_conversion(tmp_path, model):
    path, weights = model
    name = "layers.2.feed_forward.w2.weight"
    data = bytearray(path.read_bytes())
    data[data.find(weights[name].view(torch.uint8).numpy().tobytes()) + 77] ^= 4
    (tmp_path / "model.pt").write_bytes(data)
    for to in LAYOUTS[:-1]:
        output = tmp_path / ("out" if to in ("safetensors", "distributed") else "out.pt")
        with pytest.raises(ValueError, match=f"model.pt is corrupted: {name} does not match its checksum"):
            convert(tmp_path / "model.pt", output, to)
        assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def damaged_folder(tmp_path, model, damage):
    convert(model[0], tmp_path / "d", "distributed", tensor_parallel_size=2)
    damage(tmp_path / "d")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "d", tmp_path / "out.pt", "monolithic")
    assert "\n" not in str(error.value) and not (tmp_path / "out.pt").exists()
    return str(error.value)


def flip(file, position):
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


class Trap:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: flip(d / "__1_0.distcp", 90_000), r"__1_0\.distcp: embedding.word_embeddings.weight is corrupted"),
        (lambda d: os.truncate(d / "__0_0.distcp", 200_000), r"__0_0\.distcp: .* is truncated"),
        (lambda d: (d / "__1_0.distcp").unlink(), r"__1_0\.distcp: embedding.* cannot be read: No such file"),
        (lambda d: os.truncate(d / ".metadata", 500), r"\.metadata is damaged"),
        (lambda d: (d / ".metadata").unlink(), r"\.metadata cannot be read \(No such file"),
        (
            lambda d: (d / ".metadata").write_bytes(pickle.dumps(Trap())),
            r"is refused: it holds Python objects \(posix.system\)",
        ),
        (lambda d: (d / ".metadata").write_bytes(pickle.dumps({})), "does not describe a distributed checkpoint"),
    ],
)
def test_damaged_distributed_checkpoints(tmp_path, monkeypatch, model, damage, message):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, damaged_folder(tmp_path, model, damage))
    assert not (tmp_path / "executed").exists()


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nowhere.pt does not exist, nor does nowhere_model_mp_0.pt beside it"):
        open_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="holds no checkpoint: no .metadata"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("to", "sizes", "message"),
    [
        ("mp", {"tensor_parallel_size": 3}, r"--tensor_parallel_size 3 does not suit .*; possible: \[1, 2, 4, 8\]"),
        ("monolithic", {"tensor_parallel_size": 2}, "--to monolithic is not cut in shards"),
        ("mp", {"pipeline_parallel_size": 2}, "--to mp has no pipeline stages"),
        ("distributed", {"pipeline_parallel_size": 3}, "--pipeline_parallel_size 3 does not divide the 4 layers"),
        ("gguf", {}, "--to gguf is unknown; known: monolithic"),
    ],
)
def test_impossible_requests(tmp_path, model, to, sizes, message):
    with pytest.raises(ValueError, match=message):
        convert(model[0], tmp_path / "out.pt", to, **sizes)
    assert not list(tmp_path.iterdir())


# Big enough to be caught in the middle, and to show in the memory of the process: 250 MB.
BIG = ModelArch(
    num_layers=5, hidden_size=2048, ffn_hidden_size=2048, kv_channels=64, vocab_size=4096, embedding_size=4096
)


@pytest.fixture(scope="module")
def big_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("big") / "model.pt"
    shapes = original_shapes(BIG)
    with TorchFileWriter(path, {"model." + n: TensorSpec(s, torch.bfloat16) for n, s in shapes.items()}) as writer:
        for shape in shapes.values():
            writer.write(torch.randint(-9, 9, shape, dtype=torch.int8).to(torch.bfloat16))
    yield path
    shutil.rmtree(path.parent)


@pytest.mark.parametrize(("to", "where"), [("safetensors", 0.0), ("mp", 0.6), ("monolithic", 1.0)])
def test_a_corrupted_byte_in_a_big_tensor_is_noticed_at_its_end(tmp_path, big_model, to, where):
    name = "layers.3.feed_forward.w2.weight"
    damaged = tmp_path / "damaged.pt"
    shutil.copyfile(big_model, damaged)
    with zipfile.ZipFile(big_model) as archive:
        record = archive.getinfo(f"archive/data/{list(TorchFile(big_model).content).index('model.' + name)}")
    with open(damaged, "r+b") as file:
        file.seek(record.header_offset + 26)
        lengths = struct.unpack("<HH", file.read(4))
        file.seek(record.header_offset + 30 + sum(lengths) + int(where * (record.file_size - 1)))
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 8]))
    with pytest.raises(ValueError, match=f"damaged.pt is corrupted: {name} does not match its checksum"):
        convert(damaged, tmp_path / ("out" if to == "safetensors" else "out.pt"), to)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.pt"]


@pytest.mark.parametrize("preset", ["4b", "5b-video2world"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_blocks_and_their_shards_joined_are_the_tensors(tmp_path, monkeypatch, preset, size):
    monkeypatch.setattr(torch_file, "_BLOCK", 10_000)  # bytes: many blocks, which do not end where shards do
    weights = random_weights(reduced(preset))
    save_model(tmp_path / "released" / "model.pt", weights)
    convert(tmp_path / "released", tmp_path / "whole.pt", "monolithic")
    for naming in ("mp", "te"):
        convert(tmp_path / "whole.pt", tmp_path / f"{naming}.pt", naming, tensor_parallel_size=size)
        checkpoint = open_checkpoint(tmp_path / f"{naming}.pt")
        numbers = Counter()
        found = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        for name, first, block in checkpoint.stream(checkpoint.names):
            found[name][first : first + block.size(0)] = block
            numbers[name] += block.size(0)
        assert all(
            torch.equal(found[name], tensor) and numbers[name] == len(tensor) for name, tensor in weights.items()
        )
        convert(tmp_path / f"{naming}.pt", tmp_path / f"{naming}_merged.pt", "monolithic")
        assert (tmp_path / f"{naming}_merged.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


CONVERT = "import sys; from pathlib import Path; from cosmos_mcore.checkpoint.convert import convert; "


@pytest.mark.parametrize("to", ["mp", "safetensors", "distributed"])
def test_a_killed_conversion_leaves_nothing_under_the_final_name(tmp_path, big_model, to):
    output = tmp_path / ("out.pt" if to == "mp" else "out")
    code = CONVERT + f"convert(Path({str(big_model)!r}), Path({str(output)!r}), {to!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment())
    deadline = time.monotonic() + 60
    while not any(path.is_file() and path.stat().st_size > 10_000_000 for path in tmp_path.rglob("*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert all(path.name.endswith(".incomplete") for path in tmp_path.iterdir())
    convert(big_model, output, to)  # what was left is in nobody's way
    assert not list(tmp_path.glob("*.incomplete"))


def test_memory_does_not_grow_with_the_model(tmp_path, big_model):
    code = CONVERT + (
        "import resource; base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        f"model, folder = Path({str(big_model)!r}), Path({str(tmp_path)!r}); "
        "convert(model, folder / 'x.pt', 'mp', tensor_parallel_size=4); "
        "convert(folder / 'x.pt', folder / 'merged.pt', 'monolithic'); "
        "convert(folder / 'merged.pt', folder / 'hub', 'safetensors'); "
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    # A few tensors at a time; keeping what has been read would cost more than the model.
    assert int(result.stdout) < 0.7 * big_model.stat().st_size
    assert (tmp_path / "x_model_mp_0.pt").stat().st_size < 0.26 * big_model.stat().st_size
    assert (tmp_path / "merged.pt").read_bytes() == big_model.read_bytes()
