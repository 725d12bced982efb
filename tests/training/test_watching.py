"""Token accuracy and loss per latent frame in several layouts; what a run with everything switched on leaves behind."""

import gzip
import json

import pytest
from PIL import Image

from tests.processes import run_ranks

LAYOUTS = ("tp2-sp", "pp2-vpp2", "cp2")


@pytest.fixture(scope="module")
def stats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watching")
    run_ranks("tests.training.watching_worker", 1, folder, "one")
    run_ranks("tests.training.watching_worker", 2, folder, *LAYOUTS)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture
def one(stats):
    return stats["one"]


def test_against_the_whole_logits(one):
    assert one["frames"] == pytest.approx(one["expected"]["frames"], rel=1e-5)
    assert one["accuracy"] == pytest.approx(one["expected"]["accuracy"])
    assert one["loss"] == pytest.approx(sum(one["frames"]) / len(one["frames"]), rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_in_every_layout(layout, stats, one):
    found = stats[layout]
    assert found["frames"] == pytest.approx(one["frames"], rel=1e-5)
    assert found["accuracy"] == one["accuracy"] and found["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_everything_switched_on(command, small_yaml, clips, uninterrupted):
    run = command(
        small_yaml, f"data.validation_path={clips / '1.mp4'}", "training.eval_interval=4", "training.eval_iters=1",
        "logging.teacher_forcing_interval=6", "logging.profile_step_start=2", "logging.profile_step_end=4",
        "logging.profile_ranks=[1]", "logging.straggler_interval=6",
    )  # fmt: skip
    code, stdout, stderr = run.finish()
    assert code == 0, stderr
    curve = run.metrics()
    expected = [json.loads(line)["lm loss"] for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [record["lm loss"] for record in curve] == pytest.approx(expected, rel=1e-6)  # watching changes nothing
    assert [record["iteration"] for record in curve if "validation lm loss" in record] == [4, 8, 12]
    assert curve[11]["validation lm loss"] < curve[3]["validation lm loss"]
    assert {"token accuracy", "lm loss of latent frame 1", "memory (GiB)"} <= set(curve[0])
    assert "validation loss at iteration 4 | lm loss value: " in stdout
    assert "teacher-forcing accuracy: " in stdout and "iteration 6, speed of 2 ranks: median " in stdout
    pictures = sorted((run.folder / "video_sampling_teacher_forcing").iterdir())
    assert [path.name for path in pictures] == [
        f"vid_teacher_forcing_iter_{iteration:09d}_0000.jpg" for iteration in (6, 12)
    ]
    assert Image.open(pictures[0]).size == (4 * (24 + 2) + 2, 3 * (16 + 4))  # 4 frames at half size, 3 strips
    with gzip.open(run.folder / "profile" / "rank_1.json.gz") as trace:
        assert len(json.load(trace)["traceEvents"]) > 100
    assert not (run.folder / "profile" / "rank_0.json.gz").exists()
