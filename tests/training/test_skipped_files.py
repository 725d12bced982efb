"""Broken, short, audio-only and vanishing files: named once each, whichever rank finds them, and training goes on."""

from fractions import Fraction

import av
import numpy as np

from tests.videos import write_test_clip


def write_audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for i in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, 1024 * i, Fraction(1, 16000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_every_bad_file_is_named_once_and_the_rest_is_learnt(command, small_yaml, tmp_path):
    folder = tmp_path / "clips"
    for number in range(8):
        write_test_clip(folder / "good" / f"{number}.mp4", 17)
    write_test_clip(folder / "short.mp4", 16)
    (folder / "broken.mp4").write_bytes(b"not a video")
    write_audio_only(folder / "audio.mp4")
    run = command(
        small_yaml,
        f"data.path={folder}",
        "data.prefetch_steps=1",
        "training.global_batch_size=1",
        "training.micro_batch_size=1",
        "training.train_iters=60",
        "checkpoint.save_interval=60",
    )
    run.wait_for(run.metrics)
    (folder / "good" / "3.mp4").unlink()  # each of the seven passes over the eight clips comes to it
    code, stdout, stderr = run.finish()
    assert (code, stderr) == (0, "")
    records = run.metrics()
    assert len(records) == 60
    named = [file["path"] for record in records for file in record.get("skipped files", ())]
    bad = ["short.mp4", "broken.mp4", "audio.mp4", "good/3.mp4"]
    assert sorted(named) == sorted(str(folder / name) for name in bad)
    first = {file["path"]: file["reason"] for file in records[0]["skipped files"]}
    assert "has 16 frames, a clip needs 17" in first[str(folder / "short.mp4")]
    for name in bad:
        assert stdout.count(str(folder / name)) == 1
