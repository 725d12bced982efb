"""What is there already, and what cannot be written, where files are to be made."""

import errno
import os
import pickle
from dataclasses import replace

import pytest
import torch

from cosmos_mcore.checkpoint.convert import convert
from cosmos_mcore.checkpoint.distributed_reader import read_metadata
from cosmos_mcore.checkpoint.files import new_files, new_folder
from cosmos_mcore.checkpoint.recognize import open_checkpoint
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.checkpoint.training_files import write_original

ARCH = reduced("4b")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The original's training folder."""
    folder = tmp_path_factory.mktemp("original") / "run"
    write_original(folder, ARCH)
    return folder


@pytest.mark.parametrize("name", ["layers.1.feed_forward.w3.weight", "layers.2.attention.wo.weight"])
def test_what_is_stored_as_one_tensor_has_one_dtype(tmp_path, name):
    weights = random_weights(ARCH)
    weights[name] = weights[name].float()
    save_model(tmp_path / "model.pt", weights)
    with pytest.raises(ValueError, match=f"model.pt: layers.0.* and {name} differ in dtype: cannot be joined"):
        convert(tmp_path / "model.pt", tmp_path / "out", "distributed")
    assert not (tmp_path / "out").exists()
    convert(tmp_path / "model.pt", tmp_path / "out.pt", "monolithic")
    assert torch.load(tmp_path / "out.pt", weights_only=True)["model." + name].dtype is torch.float32


@pytest.mark.parametrize("to", ["mp", "training"])
def test_only_what_the_new_files_replace_is_removed(tmp_path, run, to):
    output = tmp_path / ("checkpoints" if to == "training" else "a[1].pt")
    stem = output / "iter_000000003" if to == "training" else output.with_name("a[1]")
    convert(run, output, to, tensor_parallel_size=4)
    others = [stem.with_name(f"{stem.name}{end}.pt") for end in ("_model_mp_0_mine", "_ema_mp_0", "_model_mp_x")]
    for path in others:
        path.write_text("mine")
    convert(run, output, to, tensor_parallel_size=2, force=True)
    assert all(path.exists() for path in others)
    shards = [stem.with_name(f"{stem.name}_model_mp_{rank}.pt").exists() for rank in range(4)]
    assert shards == [True, True, False, False]


def test_a_pointer_to_another_checkpoint_is_kept_without_force(tmp_path, run):
    pointer = tmp_path / "latest_checkpoint.txt"
    pointer.write_text("iter_000000008\n")
    with pytest.raises(ValueError, match="latest_checkpoint.txt exists already; give --force to replace it"):
        convert(run, tmp_path, "training")
    assert pointer.read_text() == "iter_000000008\n" and list(tmp_path.iterdir()) == [pointer]
    convert(run, tmp_path, "training", force=True)
    assert pointer.read_text() == "iter_000000003.pt\n"


@pytest.mark.parametrize("complete", [True, False])
def test_what_a_killed_replacement_has_left_is_in_nobodys_way(tmp_path, run, complete):
    output, old = tmp_path / "out", tmp_path / "out.replaced"
    convert(run, output if complete else old, "safetensors")
    if complete:  # killed while it removed the old folder
        old.mkdir()
        (old / "model.safetensors").touch()
    convert(run, output, "safetensors", force=True)
    assert list(tmp_path.iterdir()) == [output]
    assert open_checkpoint(output).layout == "safetensors"


def test_a_tensor_under_two_names_is_refused(tmp_path):
    weights = random_weights(ARCH)
    torch.save({**weights, "model.norm.weight": weights["norm.weight"] * 2}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="model.pt: norm.weight is there twice, with and without 'model.'"):
        open_checkpoint(tmp_path / "model.pt")


def test_no_other_file_is_taken_for_one_that_does_not_exist(tmp_path, run):
    convert(run, tmp_path / "out", "safetensors")
    for name in ("ema.safetensors", "modle.safetensors"):
        with pytest.raises(ValueError, match=f"{name} cannot be read: No such file or directory"):
            open_checkpoint(tmp_path / "out" / name)
    assert open_checkpoint(tmp_path / "out" / "model.safetensors").layout == "safetensors"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float8_e4m3fn])
def test_weights_are_floating_point_numbers(tmp_path, dtype):
    weights = {name: (tensor * 100).to(dtype) for name, tensor in random_weights(ARCH).items()}
    save_model(tmp_path / "model.pt", weights)
    with pytest.raises(ValueError, match=f"model.pt: tok_embeddings.weight is {dtype}, which is no dtype of weights"):
        open_checkpoint(tmp_path / "model.pt")


def test_complete_files_stay_when_only_some_get_their_names(tmp_path, run, monkeypatch):
    convert(run, tmp_path / "x.pt", "mp", tensor_parallel_size=4)
    before, replace = (tmp_path / "x_model_mp_1.pt").read_bytes(), os.replace

    def fail(path, final):
        if final.name == "x_model_mp_1.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(path, final)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ValueError, match="cannot be written: Input/output error"):
        convert(run, tmp_path / "x.pt", "mp", tensor_parallel_size=2, force=True)
    assert (tmp_path / "x_model_mp_1.pt").read_bytes() == before
    os.rename(tmp_path / "x_model_mp_1.pt.incomplete", tmp_path / "x_model_mp_1.pt")
    for rank in (2, 3):
        (tmp_path / f"x_model_mp_{rank}.pt").unlink()
    assert open_checkpoint(tmp_path / "x.pt").tensor_parallel_size == 2


def damage_offset(metadata):
    next(iter(metadata.storage_data.values())).offset = -1


def damage_field(metadata):
    del next(iter(metadata.storage_data.values())).length


def damage_name(metadata):
    key = "optimizer.state.exp_avg.norm"
    metadata.state_dict_metadata[key] = metadata.state_dict_metadata.pop(
        "optimizer.state.exp_avg.decoder.final_layernorm.weight"
    )


@pytest.mark.parametrize("damage", [damage_offset, damage_field, damage_name])
def test_a_damaged_list_of_chunks_is_one_line(tmp_path, run, damage):
    convert(run, tmp_path / "out", "distributed")
    metadata = read_metadata(tmp_path / "out")
    damage(metadata)
    (tmp_path / "out" / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="metadata is damaged"):
        open_checkpoint(tmp_path / "out")


def test_chunks_that_do_not_make_up_their_tensor(tmp_path, run):
    convert(run, tmp_path / "out", "distributed", tensor_parallel_size=2)
    metadata = read_metadata(tmp_path / "out")
    key = "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight"
    chunks = metadata.state_dict_metadata[key].chunks
    one, *others = chunks
    for wrong in ([replace(one, offsets=others[0].offsets), *others], others):  # a flipped bit, a lost entry
        metadata.state_dict_metadata[key].chunks = wrong
        (tmp_path / "out" / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=f"metadata is damaged: the chunks of {key} are not the whole of it"):
            open_checkpoint(tmp_path / "out")


def test_two_commands_do_not_write_the_same_files(tmp_path):
    one, two = tmp_path / "1.pt", tmp_path / "2.pt"
    (tmp_path / "2.pt.incomplete").write_text("left by a command that was killed")
    with new_files([one, two], force=False) as (first, second):
        first.write_text("first")
        refused = pytest.raises(ValueError, match="2.pt.incomplete is being written by another command; wait until it")
        with refused, new_files([tmp_path / "0.pt", two], force=False):
            pass
        second.write_text("second")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"1.pt": "first", "2.pt": "second"}
    with new_files([one], force=True) as (again,):
        again.write_text("again")
    assert one.read_text() == "again"


def test_two_commands_do_not_write_the_same_folder(tmp_path):
    (tmp_path / "out.incomplete").mkdir()
    (tmp_path / "out.incomplete" / "x").write_text("left by a command that was killed")
    with new_folder(tmp_path / "out", force=False) as folder:
        (folder / "y").write_text("first")
        refused = pytest.raises(ValueError, match="out.incomplete is being written by another command")
        with refused, new_folder(tmp_path / "out", force=False):
            pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/y"]
