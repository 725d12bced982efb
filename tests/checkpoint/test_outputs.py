"""Where conversions write to: full disks, links, folders that are none, and what is there already."""

import resource

import pytest

from cosmos_mcore.checkpoint.convert import LAYOUTS, convert
from tests.checkpoint.models import random_weights, reduced, save_model
from tests.checkpoint.test_convert import assert_holds


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A ``model.pt`` as released, and its weights."""
    weights = random_weights(reduced("5b-video2world"))
    return save_model(tmp_path_factory.mktemp("model") / "model.pt", weights), weights


def test_outputs_that_cannot_be_written(tmp_path, model):
    (tmp_path / "file").write_text("")
    for output, to in ((tmp_path / "file" / "x.pt", "mp"), (tmp_path / "file" / "x", "distributed")):
        with pytest.raises(ValueError, match="x(_model_mp_0.pt)? cannot be written: (Not a directory|File exists)"):
            convert(model[0], output, to)


@pytest.mark.parametrize("size", [0, 100, 300_000])
@pytest.mark.parametrize("to", LAYOUTS[:-1])
def test_no_room_on_the_disk_is_one_line(tmp_path, model, to, size):
    output = tmp_path / ("out" if to in ("safetensors", "distributed") else "out.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # as a full disk, but in the way of this process alone
    try:
        with pytest.raises(ValueError, match=r"out(_model_mp_0)?(\.pt)? cannot be written: File too large"):
            convert(model[0], output, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", LAYOUTS[:-1])
def test_existing_outputs_are_kept_without_force(tmp_path, model, to):
    path, weights = model
    output = tmp_path / ("out" if to in ("safetensors", "distributed") else "out.pt")
    size = 4 if to == "mp" else 1
    convert(path, output, to, tensor_parallel_size=size)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="exists already; give --force to replace it"):
        convert(path, output, to, tensor_parallel_size=size)
    assert sorted(tmp_path.rglob("*")) == before
    convert(path, output, to, tensor_parallel_size=2 if to == "mp" else 1, force=True)
    assert_holds(output, weights, to)  # and no shards of the former size are left
    assert not list(tmp_path.glob("*.incomplete")) and not list(tmp_path.glob("*.replaced"))


def test_an_output_folder_that_is_a_link_is_replaced_by_a_folder(tmp_path, model):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "out").symlink_to("elsewhere")
    convert(model[0], tmp_path / "out", "safetensors", force=True)
    assert_holds(tmp_path / "out", model[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]
    assert (tmp_path / "elsewhere" / "kept").exists() and not (tmp_path / "out").is_symlink()
