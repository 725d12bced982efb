"""Megatron's distributed format: what is saved comes back, and nothing incomplete is taken for a checkpoint."""

import json

import megatron.core
import pytest
from packaging.version import Version

from cosmos_mcore.checkpoint.distributed import remove_old_checkpoints
from cosmos_mcore.checkpoint.pointer import candidates, checkpoint_name, latest_checkpoint
from tests.checkpoint.distributed_worker import DAMAGES
from tests.processes import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_ranks("tests.checkpoint.distributed_worker", 1, folder)
    return json.loads((folder / "results.json").read_text())


def test_only_complete_files_are_left_after_a_save(results):
    assert results["files"] == ["iter_000000003", "latest_checkpoint.txt"]


def test_a_save_starts_no_process(results):
    assert results["forks"] == 0
    assert results["children"] == []  # one that was spawned would outlive a rank that is killed


def test_a_plan_needs_no_room_for_temporary_files(results):
    assert results["no room"]


def test_weights_and_optimizer_come_back(results):
    assert results["moved"]
    assert results["progress"] == {"iteration": 3, "consumed_samples": 0}
    assert all(results["restored"])
    assert set(results["steps"]) == {3}


def test_weights_alone(results):
    assert results["weights"] == [True, True]


def test_weights_to_start_from_are_compared_with_their_checksums(results):
    assert results["flipped optimizer.state.exp_avg."] == "no error"  # not read
    text = results["flipped "]
    assert "flipped cannot be loaded: " in text and "is damaged: its bytes do not match their checksum" in text


def test_an_interrupted_save_leaves_the_last_complete_checkpoint(results):
    *interrupted, complete = results["interrupted"].values()
    assert interrupted == ["iter_000000003"] * 4
    assert complete == "iter_000000004"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("wider", "24 misshapen: layers.0.feed_forward.w1.weight is [96, 64], not [128, 64]"),
        ("deeper", "11 missing: layers.8.attention.wq.weight"),
        ("more words", "2 misshapen: tok_embeddings.weight is [512, 64], not [1024, 64]"),
        ("fewer words", "2 misshapen: tok_embeddings.weight is [512, 64], not [256, 64]"),
    ],
)
def test_another_model_is_refused(results, other, difference):
    text = results["other models"][other]
    assert f"iter_000000003 is not of the configured model: {difference}" in text and "\n" not in text


def test_a_model_that_reads_text_is_not_taken_for_one_that_does_not(results):
    assert "v2w is not of the configured model: 56 unexpected: layers.0.cross_attention.wq.weight" in results["text"]


def test_what_a_newer_megatron_has_written_is_loaded_by_it_and_named_by_others(results):
    if Version(megatron.core.__version__) >= Version("0.19"):
        assert results["newer"] == "no error"
    else:
        assert "newer was written by megatron-core 0.19 or newer" in results["newer"] and "\n" not in results["newer"]


def test_another_model_is_not_resumed(results):
    assert (
        "is not of the configured model: 1 misshapen: output.weight is [512, 64], not [1024, 64]" in results["resumed"]
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence(results, damage):
    if damage not in results["damages"]:
        pytest.skip(f"this Megatron-Core writes no {DAMAGES[damage][0]}")
    text = results["damages"][damage]
    assert "/damaged " in text and "\n" not in text
    assert not text.startswith("not a ValueError") and text != "no error"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    run_ranks("tests.checkpoint.conversion_worker", 1, folder)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("run", ["one bf16", "one-unsharded bf16", "one-unsharded fp32"])
def test_a_conversion_keeps_all_that_a_resume_needs(converted, run):
    found = converted[run]
    assert found["progress"] == {"iteration": 5, "consumed_samples": 24}
    assert found["step"] == found["moments"] == 2
    assert found["exact"] == ("bf16" in run)  # there are float32 weights beside those of the model
    assert found["different"] == []


@pytest.fixture
def folder(tmp_path):
    """Five complete checkpoints, one that is being written, and other files."""
    for iteration in (2, 4, 6, 8, 10):
        (tmp_path / checkpoint_name(iteration)).mkdir()
        (tmp_path / checkpoint_name(iteration) / "metadata.json").write_text("{}")
    (tmp_path / "iter_000000012.incomplete").mkdir()
    (tmp_path / "iter_000000012.incomplete" / "metadata.json").write_text("{}")
    (tmp_path / "iter_000000010.pt").write_text("")
    (tmp_path / "latest_checkpoint.txt").write_text("iter_000000010\n")
    return tmp_path


def left(folder):
    return [int(path.name[5:]) for path in sorted(folder.glob("iter_*")) if path.name[5:].isdigit()]


def test_the_newest_stay(folder):
    remove_old_checkpoints(folder, keep=2)
    assert left(folder) == [8, 10]
    assert (folder / "iter_000000010.pt").exists()
    remove_old_checkpoints(folder, keep=5)
    assert left(folder) == [8, 10]


@pytest.mark.parametrize("exports", [False, True])
def test_exported_files_go_with_their_checkpoint(folder, exports):
    of_old = [
        folder / f"iter_000000004{end}" for end in (".pt", "_model_mp_0.pt", "_optim_mp_0.pt", "_scheduler_mp_0.pt")
    ]
    others = [folder / name for name in ("iter_000000004.safetensors", "iter_000000004_model_mp_0_mine.pt")]
    others += [folder / "iter_000000010_model_mp_0.pt"]
    for path in (*of_old, *others):
        path.write_text("")
    remove_old_checkpoints(folder, keep=2, exports=exports)
    assert left(folder) == [8, 10]
    assert all(path.exists() != exports for path in of_old) and all(path.exists() for path in others)


def test_those_of_a_run_that_was_sent_back_are_counted_from_where_it_is(folder):
    (folder / "latest_checkpoint.txt").write_text("iter_000000006\n")
    remove_old_checkpoints(folder, keep=2)
    assert left(folder) == [4, 6, 8, 10]  # 4 is the only one to fall back on
    remove_old_checkpoints(folder, keep=1)
    assert left(folder) == [6, 8, 10]


def test_latest(folder):
    assert latest_checkpoint(folder) == folder / "iter_000000010"
    assert latest_checkpoint(folder / "nowhere") is None
    (folder / "iter_000000010" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="names iter_000000010, which is not a complete checkpoint"):
        latest_checkpoint(folder)
    (folder / "latest_checkpoint.txt").write_bytes(b"iter_0\xb0\xff\n")  # a damaged disk
    with pytest.raises(ValueError, match="names iter_0.+, which is not a complete checkpoint"):
        latest_checkpoint(folder)
    assert candidates(folder)[0] == folder / "iter_000000008"
