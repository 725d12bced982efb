"""Saves that fail, checkpoints that are damaged, and stops in awkward moments, on two ranks."""

import json

import pytest

from tests.processes import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    run_ranks("tests.training.saving_worker", 2, folder)
    return json.loads((folder / "results.json").read_text())


def test_a_folder_that_cannot_be_made_is_loud_and_counted(results):
    lines, saved = results["failures"]["not a folder"]
    assert saved == [] and len(lines) == 1
    assert "SAVING FAILED (1 of at most 3 times in a row)" in lines[0]
    assert "Training goes on; next try" in lines[0] and "complete checkpoint is none" in lines[0]


def test_a_failed_save_is_tried_again_in_a_later_step(results):
    lines, saved = results["failures"]["mended"]
    assert lines == [] and saved == [2]


def test_a_full_disk_on_one_rank_leaves_the_checkpoint_before(results):
    lines, saved, untouched = results["failures"]["full disk"]
    assert saved == [2] and untouched
    assert "1 of at most 3" in lines[0] and "rank 1: No space left on device" in lines[0]


def test_too_many_failures_in_a_row_end_the_run(results):
    assert results["failures"]["limit"].startswith("3 saves in a row have failed")
    assert "Read-only file system" in results["failures"]["limit"]
    assert results["failures"]["limit"].endswith("newest complete checkpoint is that of iteration 2")


def test_a_run_that_is_done_waits_for_room(results):
    lines, complete = results["failures"]["done"]
    assert len(lines) == 1 and "Training is done and waits for its last checkpoint; next try in" in lines[0]
    assert complete


def test_the_newest_and_the_multiples_stay(results):
    iterations, last, lines = results["kept"]
    assert iterations[-2:] == [last - 1, last] and lines == []
    assert all(iteration % 5 == 0 for iteration in iterations[:-2])


def test_the_originals_files_lie_beside_a_save(results):
    found, lines = results["exported"]
    kinds = ("model", "optim", "scheduler")
    assert found["1"] == ["training", 1, True, True, [".pt"]]
    assert found["2"] == ["training", 2, True, True, [".pt", *(f"_{kind}_mp_{k}.pt" for kind in kinds for k in (0, 1))]]
    assert lines == []


def test_an_export_that_fails_is_loud_and_keeps_no_old_checkpoint(results):
    (_, line), left, last = results["exports"]
    assert "SAVING FAILED (2 of at most 3 times in a row)" in line and "x.pt cannot be written" in line
    assert line.endswith(f"The newest complete checkpoint is that of iteration {last}")
    assert left == [last - 1, last]


def test_a_damaged_checkpoint_is_skipped_with_a_warning(results):
    found = results["damaged"]
    assert found["iteration"] and found["named"] and found["aside"]
    assert "__1_0.distcp is damaged: its bytes do not match their checksum" in found["log"][0]


def test_a_request_to_stop_ends_the_wait_for_clips(results):
    assert results["stopped"][:2] == ["SIGUSR1", True]


def test_a_callback_that_cannot_write_is_named_once_and_ends_nothing(results):
    (line,) = results["stopped"][2]
    assert line == "FullDisk cannot write ([Errno 28] No space left on device); training goes on"


def test_nothing_is_left_over(results):
    assert results["other folders"] == []
