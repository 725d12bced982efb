"""Long videos, five chunks of 33 frames, train with context parallelism and give the numbers of one process."""

import pytest

from tests.videos import write_test_clip


@pytest.mark.layouts
def test_five_chunks_with_context_parallelism(small_yaml, command, tmp_path):
    for number in range(2):
        write_test_clip(tmp_path / f"{number}.mp4", 170)
    overrides = [
        f"data.path={tmp_path}",
        "data.num_frames=165",
        "data.start_frame_interval=1",
        "parallel.tensor_model_parallel_size=1",
        "training.train_iters=4",
        "training.global_batch_size=2",
        "training.micro_batch_size=1",
    ]
    curves = []
    for name, context in (("one", 1), ("two", 2)):
        run = command(small_yaml, *overrides, f"parallel.context_parallel_size={context}", output_root=tmp_path / name)
        code, stdout, stderr = run.finish()
        assert code == 0, stderr
        assert "latent shape (T, H, W)             (25, 2, 3)" in stdout
        assert f"150 (padded to {152 if context == 2 else 150})" in stdout
        curves.append([(record["lm loss"], record["grad norm"]) for record in run.metrics()])
    for (loss, norm), (loss_two, norm_two) in zip(*curves, strict=True):
        assert loss_two == pytest.approx(loss, rel=1e-5)
        assert norm_two == pytest.approx(norm, rel=1e-4)
