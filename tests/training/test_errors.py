"""A user's mistake: one line, exit code 2, no traceback, soon, and no process left behind."""

import os
import shutil

import pytest


def limit():
    """Ten seconds on a machine with nothing else to do."""
    return 10 * max(1, os.getloadavg()[0] / os.cpu_count())


def check_one_line(run, *parts):
    code, _, stderr = run.finish()
    assert stderr.startswith("error: ") and stderr.count("\n") == 1, stderr
    for part in parts:
        assert part in stderr
    assert code == 2
    assert run.seconds < limit()


def test_unknown_key(command, small_yaml):
    check_one_line(command(small_yaml, "training.lr=1"), "unknown key training.lr; did you mean optimizer.lr?")


def test_no_such_config(command, small_yaml):
    check_one_line(command(small_yaml.with_name("smal.yaml")), "there is no such config file; did you mean")


def test_missing_data_folder(command, small_yaml, tmp_path):
    check_one_line(command(small_yaml, f"data.path={tmp_path / 'nowhere'}"), "does not exist", "data.path")


def test_empty_data_folder(command, small_yaml, tmp_path):
    (tmp_path / "empty").mkdir()
    check_one_line(command(small_yaml, f"data.path={tmp_path / 'empty'}"), "holds no .mp4 file")


def test_nothing_usable_in_the_data_folder(command, small_yaml, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_bytes(b"not a video")
    check_one_line(command(small_yaml, f"data.path={tmp_path / 'broken'}"), "none of the 1 MP4 files is usable")


def test_wrong_layout(command, small_yaml):
    run = command(small_yaml, "parallel.tensor_model_parallel_size=3")
    check_one_line(run, "tensor_model_parallel_size=3 does not divide", "try 2")


def test_batch_that_does_not_divide(command, small_yaml):
    check_one_line(command(small_yaml, "training.global_batch_size=5"), "must be a multiple", "global_batch_size=6")


def test_pipeline_without_whole_rounds_of_micro_batches(command, small_yaml):
    changes = ("parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=2", "model.num_layers=4")
    run = command(
        small_yaml, *changes, "parallel.virtual_pipeline_model_parallel_size=2", "training.global_batch_size=6"
    )
    check_one_line(run, "micro-batches in multiples of")


def test_output_folder_that_cannot_be_made(command, small_yaml, tmp_path):
    (tmp_path / "file").write_text("")
    check_one_line(command(small_yaml, output_root=tmp_path / "file"), "cannot be made", "set OUTPUT_ROOT")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_folder_that_may_not_be_written(command, small_yaml, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    check_one_line(command(small_yaml, output_root=tmp_path / "locked"), "not a writable folder")


def test_missing_checkpoint(command, small_yaml, tmp_path):
    check_one_line(command(small_yaml, f"checkpoint.load={tmp_path / 'no.pt'}"), "no.pt does not exist")


def test_garbage_as_checkpoint(command, small_yaml, tmp_path):
    (tmp_path / "model.pt").write_bytes(b"PK\x03\x04 but not really a zip file" * 100)
    check_one_line(command(small_yaml, f"checkpoint.load={tmp_path / 'model.pt'}"), "model.pt")


def test_checkpoint_of_another_model(command, small_yaml, uninterrupted):
    load = f"checkpoint.load={uninterrupted / 'checkpoints' / 'iter_000000004'}"
    check_one_line(command(small_yaml, load, "model.hidden_size=48"), "iter_000000004 is not of the configured model")


@pytest.fixture
def copy(uninterrupted, tmp_path):
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(uninterrupted, tmp_path / "out" / "tests" / "small" / "run")


def truncate(checkpoint):
    for path in checkpoint.glob("*.distcp"):
        os.truncate(path, path.stat().st_size // 2)


def test_no_undamaged_checkpoint_of_the_run_itself(command, small_yaml, copy):
    for checkpoint in (copy / "checkpoints").glob("iter_*"):
        truncate(checkpoint)
    check_one_line(command(small_yaml, "training.train_iters=13"), "iter_000000012 cannot be loaded", "is truncated")


def test_latest_checkpoint_that_is_not_there(command, small_yaml, copy):
    for checkpoint in (copy / "checkpoints").glob("iter_*"):
        shutil.rmtree(checkpoint)
    check_one_line(command(small_yaml), "latest_checkpoint.txt names iter_000000012", "delete it to start afresh")


@pytest.mark.parametrize(
    ("change", "part"),
    [("optimzer.lr=1", "unknown key optimzer.lr"), ("data.path=/does/not/exist", "/does/not/exist does not exist")],
)
def test_under_torchrun(command, small_yaml, change, part):
    code, _, stderr = command(small_yaml, change, torchrun=2).finish()
    assert code == 1  # torchrun's own, whatever its ranks return
    assert stderr.count("error: ") == 1 and part in stderr
    assert "exitcode  : 2" in stderr
    assert "cosmos_mcore/" not in stderr  # no traceback of ours


def test_wrong_number_of_processes_under_torchrun(command, small_yaml):
    code, _, stderr = command(small_yaml, torchrun=3).finish()
    assert code == 1
    assert stderr.count("error: ") == 1 and "needs a multiple of 2 processes, but there are 3" in stderr
