"""What the page shows, state by state, without a browser."""

import re
import shutil
from dataclasses import replace

import av
import pytest
import torch
from PIL import Image

from cosmos_mcore.config import RunConfig
from cosmos_mcore.inference.guardrail import Guardrail
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.inference.video_io import read_conditioning, write_mp4
from cosmos_mcore.inference.web import State, Studio, status_line
from cosmos_mcore.tokenizer.haar import HaarTokenizer
from tests.inference.models import NO_GROUP, random_weights
from tests.inference.test_pipeline import ARCH, LAYOUT, make


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uploads")
    write_mp4(folder / "clip.mp4", torch.linspace(-1, 1, 48).expand(3, 12, 32, 48), 12)
    write_mp4(folder / "short.mp4", torch.zeros(3, 3, 32, 48), 12)
    Image.new("L", (64, 64), 90).save(folder / "picture.webp")
    (folder / "sound.wav").write_bytes(b"RIFF0000WAVEfmt ")
    return folder


@pytest.fixture(scope="module")
def pipeline():
    return make()


def open_studio(pipeline, folder, guardrail=None, prompts=None):
    config = RunConfig()
    config.data.height, config.data.width, config.data.num_frames = 32, 48, 25
    return Studio(pipeline, config, prompts, guardrail, folder)


@pytest.fixture
def studio(pipeline, tmp_path):
    with open_studio(pipeline, tmp_path) as studio:
        yield studio


def counts(state):
    return tuple(len(re.findall(f'class="{kind}"', state.film)) for kind in ("given", "generated", "missing"))


def test_frames_come_latent_frame_by_latent_frame(studio, pipeline, uploads, tmp_path):
    states = []
    for state in studio.continue_upload(str(uploads / "clip.mp4"), "", 25, 1.0, 0.8, 3):
        states.append(state)
        if state.video is not None:
            shutil.copy(state.video, tmp_path / "made.mp4")
    assert [state.message for state in states[:-1]] == [
        "waiting for the model ...",
        "9 of 25 frames",
        "17 of 25 frames",
    ]
    assert re.fullmatch(r"25 frames of 32x48 at 12 frames per second, seed 3, in \d+\.\d s", states[-1].message)
    assert [counts(state) for state in states[1:]] == [(9, 0, 16), (9, 8, 8), (9, 16, 0)]
    assert not any(state.failed for state in states)
    given = read_conditioning(uploads / "clip.mp4", 9, 32, 48)
    (made,) = pipeline.continue_videos(given, SamplingOptions(1.0, 0.8), [3])
    expected = write_mp4(tmp_path / "expected.mp4", made.video, 12)
    assert states[-1].video.name == "clip_1.mp4" and not states[-1].video.exists()
    assert (tmp_path / "made.mp4").read_bytes() == expected.read_bytes()
    with av.open(str(expected)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 25


def test_an_image_and_a_chain_of_clips(studio, uploads):
    states = list(studio.continue_upload(str(uploads / "picture.webp"), "", 44, 0, 0.8, 0))
    assert [counts(state)[0] for state in states[1:]] == [1] * (len(states) - 1)
    shown = [sum(counts(state)[:2]) for state in states[1:]]
    assert shown == sorted(shown) and shown[0] == 1 and {9, 17, 25, 33, 41, 44} <= set(shown)
    assert "44 frames" in states[-1].message


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (None, (25, 1.0, 0.8, 0), "error: choose an image or a video first"),
        ("sound.wav", (25, 1.0, 0.8, 0), "sound.wav"),
        ("short.mp4", (25, 1.0, 0.8, 0), "short.mp4 has 3 frames, but 9 are needed"),
        ("clip.mp4", (9, 1.0, 0.8, 0), "leaves nothing to generate"),
        ("clip.mp4", (25, 1.0, 1.5, 0), "top_p=1.5 must lie between"),
        ("clip.mp4", (25, 1.0, 0.8, None), "the seed must be a number"),
        ("clip.mp4", (25, 1.0, 0.8, -1), "the seed must be a number"),
    ],
)
def test_a_mistake_is_one_line_that_tells_no_path(studio, uploads, tmp_path, name, settings, message):
    *_, last = studio.continue_upload(None if name is None else str(uploads / name), "", *settings)
    assert last.failed and last.message.startswith("error: ") and message in last.message
    assert "\n" not in last.message and str(uploads) not in last.message
    assert list(tmp_path.iterdir()) == []


class Checker:
    """Stands for the guardrail's package: lets so many videos pass."""

    def __init__(self, passes):
        self.passes = passes

    def check_text_safety(self, prompt):
        return prompt != "sun"

    def check_video_safety(self, frames):
        self.passes -= 1
        return frames // 2 if self.passes >= 0 else None


def test_the_guardrail_sees_everything_first(pipeline, uploads, tmp_path):
    with open_studio(pipeline, tmp_path, Guardrail(Checker(2))) as studio:
        states = list(studio.continue_upload(str(uploads / "clip.mp4"), "", 25, 1.0, 0.8, 0))
    assert [bool(state.film) for state in states] == [False, True, True, False]
    assert states[-1] == State("error: the guardrail blocks this video", failed=True)
    assert list(tmp_path.iterdir()) == []


class Prompts:
    """Stands for the text encoder: knows two prompts."""

    texts = {prompt: torch.full((5, 16), float(number)) for number, prompt in enumerate(("rain", "sun"), 1)}

    def check(self, prompts):
        if prompts[0] not in self.texts:
            raise ValueError("there is no text encoder")

    def embed(self, prompts, device, group):
        return {prompt: self.texts[prompt] for prompt in prompts}


def test_a_model_that_reads_text_is_told_the_prompt(uploads, tmp_path, monkeypatch):
    arch = replace(ARCH, embedding_size=64064, context_size=16)
    layout = replace(LAYOUT, begin_of_video=True, padded_sequence_length=25)
    network, told = CachedNetwork(random_weights(arch), arch, layout, NO_GROUP), []
    prefill = network.prefill
    monkeypatch.setattr(network, "prefill", lambda *given: told.append(given[-1]) or prefill(*given))
    pipeline = VideoPipeline(network, lambda: HaarTokenizer(25))
    clip = str(uploads / "clip.mp4")
    with open_studio(pipeline, tmp_path, prompts=Prompts()) as studio:
        *_, last = studio.continue_upload(clip, " sun\n", 25, 1.0, 0.8, 0)
        *_, empty = studio.continue_upload(clip, "  ", 25, 1.0, 0.8, 0)
        *_, unknown = studio.continue_upload(clip, "snow", 25, 1.0, 0.8, 0)
    assert last.video is not None
    assert [text.shape for text in told] == [(1, 5, 16)] and (told[0] == 2).all()
    assert empty.message == "error: say in the prompt what the video shows"
    assert unknown.message == "error: there is no text encoder"
    with open_studio(pipeline, tmp_path, Guardrail(Checker(0)), Prompts()) as studio:
        states = list(studio.continue_upload(clip, "sun", 25, 1.0, 0.8, 0))
    assert states == [State("error: the guardrail blocks this prompt", failed=True)] and len(told) == 1


def test_who_leaves_early_does_not_hold_up_the_next_one(studio, pipeline, uploads, monkeypatch):
    finished, generate = [], pipeline.continue_videos

    def watched(given, options, seeds, *more):
        made = generate(given, options, seeds, *more)
        finished.extend(seeds)
        return made

    monkeypatch.setattr(pipeline, "continue_videos", watched)
    first = studio.continue_upload(str(uploads / "clip.mp4"), "", 100, 1.0, 0.8, 1)
    next(first), next(first)
    first.close()
    *_, last = studio.continue_upload(str(uploads / "clip.mp4"), "", 25, 1.0, 0.8, 2)
    assert last.video is not None
    assert finished == [2], "the first one's work has ended"


def test_any_other_error_is_one_line_too(studio, pipeline, uploads, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("first line\nsecond")

    monkeypatch.setattr(pipeline, "continue_videos", fail)
    *_, last = studio.continue_upload(str(uploads / "clip.mp4"), "", 25, 1.0, 0.8, 0)
    assert last.message == "error: RuntimeError: first line second"


def test_messages_are_no_html():
    assert status_line(State("<b>", failed=True)) == '<div class="status failed" role="status">&lt;b&gt;</div>'
