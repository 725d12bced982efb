"""Clips that the model generates while it trains: by generation's code, and without a trace in the loss curve."""

import json
import shutil

import av
import pytest
import torch
from PIL import Image

from cosmos_mcore.config import derive_video_layout, load_config
from cosmos_mcore.data.decode import build_decoder
from cosmos_mcore.data.index import index_clips
from cosmos_mcore.data.sampler import RoundSampler
from cosmos_mcore.data.transforms import normalize
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.video_io import write_mp4
from cosmos_mcore.inference.weights import load_weights
from cosmos_mcore.model.presets import resolve_arch
from cosmos_mcore.parallel.initialize import initialize, shut_down
from cosmos_mcore.tokenizer.build import build_tokenizer
from tests.inference.models import NO_GROUP
from tests.processes import run_ranks

SHORT = "training.train_iters=4,checkpoint.save_interval=4"
ALONE = SHORT + ",parallel.tensor_model_parallel_size=1"
SHARED = ALONE + ",parallel.overlap_grad_reduce=true,parallel.overlap_param_gather=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_yaml, clips):
    folder = tmp_path_factory.mktemp("samples")
    for name in ("validation.mp4", "doomed.mp4"):
        shutil.copy(clips / "1.mp4", folder / name)
    validated = f"one:{ALONE},data.validation_path={folder / 'validation.mp4'},training.eval_interval=3"
    doomed = f"unreadable:{ALONE},data.validation_path={folder / 'doomed.mp4'}"
    worker = "tests.training.samples_worker"
    run_ranks(worker, 1, folder, small_yaml, validated, doomed, f"unwritable:{ALONE}")
    run_ranks(worker, 2, folder, small_yaml, f"tp2:{SHORT}")
    return folder


@pytest.fixture(scope="module")
def other_layouts(folder, small_yaml):
    jobs = f"dp2:{SHARED}", f"cp2:{ALONE},parallel.context_parallel_size=2"
    run_ranks("tests.training.samples_worker", 2, folder, small_yaml, *jobs)


def run_of(folder, job, switch="on"):
    return folder / job / switch / "tests" / "small" / "run"


def curve(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["lm loss"], record["z loss"], record["grad norm"]) for record in records]


@pytest.mark.layouts
@pytest.mark.parametrize("job", ["dp2", "cp2"])
def test_other_layouts(folder, other_layouts, job):
    test_training_does_not_notice(folder, job)
    test_a_video_a_strip_and_a_picture_in_tensorboard(folder, job)


@pytest.mark.parametrize("job", ["one", "tp2", "unwritable", "unreadable"])
def test_training_does_not_notice(folder, job):
    with_samples = curve(run_of(folder, job, "on"))
    without = curve(run_of(folder, "one" if job.startswith("un") else job, "off"))
    assert len(with_samples) == 4
    assert with_samples == without


@pytest.mark.parametrize("job", ["one", "tp2"])
def test_a_video_a_strip_and_a_picture_in_tensorboard(folder, job):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_of(folder, job)
    names = [f"iter_{iteration:09d}{end}" for iteration in (2, 4) for end in (".mp4", "_strip.png")]
    assert sorted(path.name for path in (run / "samples").iterdir()) == sorted(names)
    with av.open(str(run / "samples" / names[0])) as file:
        assert sum(1 for _ in file.decode(video=0)) == 17
        assert (file.streams.video[0].height, file.streams.video[0].width) == (32, 48)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    strip = Image.open(run / "samples" / names[1])
    assert [(event.step, event.width, event.height) for event in events.Images("sample")] == [
        (iteration, *strip.size) for iteration in (2, 4)
    ]


@pytest.mark.parametrize("job", ["unwritable", "unreadable"])
def test_what_goes_wrong_with_a_sample_ends_no_run(folder, job):
    samples = run_of(folder, job) / "samples"
    assert samples.is_file() if job == "unwritable" else not samples.exists()


def test_it_is_what_generation_makes_of_the_checkpoint(folder, small_yaml, tmp_path):
    run = run_of(folder, "one")
    config = load_config(
        small_yaml, ["parallel.tensor_model_parallel_size=1", f"data.path={folder / 'validation.mp4'}"]
    )
    arch, layout, data = resolve_arch(config.model), derive_video_layout(config), config.data
    device = initialize(config.parallel, 0)
    weights = load_weights(run / "checkpoints" / "iter_000000004", arch, device, torch.float32)
    shut_down()
    clips = index_clips(data).clips
    clip = clips[RoundSampler(len(clips), 0, len(clips)).clip_indices(0, 1)[0]]
    tokenizer = build_tokenizer(config, device)
    ids = tokenizer.encode(normalize(build_decoder(data, device).decode(clip))[None]).long()
    generator = TokenGenerator(CachedNetwork(weights, arch, layout, NO_GROUP), 1, SamplingOptions())
    made = generator(ids[:, :1].flatten(1), 12, [0])
    path = write_mp4(tmp_path / "made.mp4", tokenizer.decode(made.view(ids.shape))[0], 30)
    assert path.read_bytes() == (run / "samples" / "iter_000000004.mp4").read_bytes()
    assert path.read_bytes() != (run / "samples" / "iter_000000002.mp4").read_bytes()
