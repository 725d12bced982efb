"""From frames to frames, with a tiny model of random weights on one process."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cosmos_mcore.config.derived import VideoLayout
from cosmos_mcore.inference.diffusion import decoder as diffusion
from cosmos_mcore.inference.generate import TokenGenerator
from cosmos_mcore.inference.network import CachedNetwork
from cosmos_mcore.inference.pipeline import VideoPipeline
from cosmos_mcore.inference.sampling import SamplingOptions
from cosmos_mcore.model.presets import ModelArch
from cosmos_mcore.tokenizer.cv8x8x8 import ContinuousDecoder
from cosmos_mcore.tokenizer.haar import HaarTokenizer
from cosmos_mcore.tokenizer.networks import Decoder, NetworkSize
from tests.inference.diffusion.small import SMALL, random_network
from tests.inference.models import NO_GROUP, random_weights
from tests.tokenizer.released import seeded

ARCH = ModelArch(2, 64, 96, 4, 2, 16)
LAYOUT = VideoLayout(25, (4, 2, 3), False, 24, 5)
OPTIONS = SamplingOptions(1.0, 0.8)


def make(layout=LAYOUT, **options):
    network = CachedNetwork(random_weights(ARCH), ARCH, layout, NO_GROUP)
    return VideoPipeline(network, lambda: HaarTokenizer(layout.pixel_chunk_duration), **options)


@pytest.fixture(scope="module")
def pipeline():
    return make()


@pytest.fixture(scope="module")
def clips():
    return torch.rand(2, 3, 25, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


def ids_of(results):
    return [torch.cat(list(made.ids)) for made in results]


def test_a_continuation_keeps_what_was_given_and_fills_the_clip(pipeline, clips):
    tokenizer = HaarTokenizer(25)
    whole = tokenizer.encode(clips[:1])[0]
    for frames, latents in ((1, 1), (9, 2)):
        (made,) = pipeline.continue_videos(clips[:1, :, :frames], OPTIONS, [0])
        assert made.num_given == frames
        assert made.video.shape == (3, 25, 32, 48)
        (ids,) = made.ids
        assert torch.equal(ids[:latents], whole[:latents].long())
        assert not torch.equal(ids[latents:], whole[latents:].long())
        assert torch.equal(made.video, tokenizer.decode(ids[None])[0])


def test_seed_and_input_alone_decide(pipeline, clips):
    given = clips[:, :, :9]
    both = ids_of(pipeline.continue_videos(given, OPTIONS, [3, 4]))
    swapped = ids_of(pipeline.continue_videos(given.flip(0), OPTIONS, [4, 3]))
    alone = ids_of(pipeline.continue_videos(given[1:], OPTIONS, [4]))
    other = ids_of(pipeline.continue_videos(given[1:], OPTIONS, [5]))
    assert torch.equal(both[0], swapped[1])
    assert torch.equal(both[1], swapped[0])
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(alone[0], other[0])


@pytest.mark.parametrize("num_given", [1, 9])
def test_long_videos_are_chained_clips(pipeline, clips, num_given):
    given = clips[:1, :, :num_given]
    (made,) = pipeline.continue_videos(given, OPTIONS, [0], num_frames=60)
    assert made.video.shape[1] == 60
    (first,) = pipeline.continue_videos(given, OPTIONS, [0])
    assert torch.equal(made.video[:, :25], first.video)
    # The second clip starts from the last frames of the first one, encoded anew, and loses them.
    tokenizer = HaarTokenizer(25)
    latents = 1 if num_given == 1 else 2
    again = tokenizer.encode(first.video[None, :, -num_given:].clamp(-1, 1))[0]
    assert torch.equal(made.ids[1][:latents], again.long())
    second = tokenizer.decode(made.ids[1][None])[0]
    assert torch.equal(made.video[:, 25 : 50 - num_given], second[:, num_given:])
    # No more latent frames than the frames that are missing need.
    missing = 60 - 25 - (len(made.ids) - 2) * (25 - num_given)
    assert len(made.ids[-1]) == -(-(missing + num_given - 1) // 8) + 1


def test_a_shorter_video_costs_fewer_tokens(pipeline, clips):
    (made,) = pipeline.continue_videos(clips[:1, :, :1], OPTIONS, [0], num_frames=11)
    (whole,) = pipeline.continue_videos(clips[:1, :, :1], OPTIONS, [0])
    assert made.video.shape[1] == 11
    assert torch.equal(made.ids[0], whole.ids[0][:3])


def test_clips_of_several_chunks_are_decoded_whole(clips):
    pipeline = make(VideoLayout(9, (4, 2, 3), False, 24, 5))
    assert pipeline.clip_frames == 18
    (made,) = pipeline.continue_videos(clips[:1, :, :9], OPTIONS, [0], num_frames=20)
    assert [len(ids) for ids in made.ids] == [4, 4]
    assert made.video.shape[1] == 20


def test_offloading_changes_nothing_but_memory(pipeline, clips):
    given = clips[:1, :, :9]
    made = []
    offloaded = VideoPipeline(
        CachedNetwork(random_weights(ARCH), ARCH, LAYOUT, NO_GROUP),
        lambda: made.append(1) or HaarTokenizer(25),
        offload_network=True,
        offload_tokenizer=True,
    )
    embedding = offloaded.network.weights.embedding
    assert embedding.untyped_storage().nbytes() == 0
    for _ in range(2):
        (result,) = offloaded.continue_videos(given, OPTIONS, [0])
        assert embedding.untyped_storage().nbytes() == 0
    assert len(made) == 4  # to encode and to decode, twice
    assert torch.equal(ids_of([result])[0], ids_of(pipeline.continue_videos(given, OPTIONS, [0]))[0])


def test_an_old_cache_is_gone_before_the_next_one_comes(clips, monkeypatch):
    pipeline, alive = make(), []
    pipeline.continue_videos(clips[:1, :, :9], OPTIONS, [0])
    old = weakref.ref(pipeline._generator)
    monkeypatch.setattr(
        "cosmos_mcore.inference.pipeline.TokenGenerator", lambda *of: alive.append(old()) or TokenGenerator(*of)
    )
    pipeline.continue_videos(clips[:1, :, :1], OPTIONS, [1])
    assert alive == [], "the same one serves"
    pipeline.continue_videos(clips[:, :, :9], OPTIONS, [0, 1])
    assert alive == [None]


def test_fp8_weights_give_nearly_the_same_logits():
    prompt = torch.arange(12)[None]
    logits = []
    for fp8 in (False, True):
        network = CachedNetwork(random_weights(ARCH, fp8=fp8), ARCH, LAYOUT, NO_GROUP)
        logits.append(network.prefill(prompt, network.new_cache(1)))
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 1e-4 < error < 0.03


@pytest.fixture
def decoder(monkeypatch):
    """A small diffusion decoder that knows the tokenizer's ids, in two steps instead of fifteen."""
    monkeypatch.setattr(diffusion, "noise_levels", lambda: [80.0, 1.0, 0.0])
    size = replace(SMALL, vocab_size=64000)
    tokenizer = seeded(Decoder(NetworkSize(8, 16, channels=4)), 2)
    frames = ContinuousDecoder(tokenizer, torch.zeros(16, 8), torch.ones(16, 8), torch.device("cpu"))
    return diffusion.DiffusionDecoder(random_network(size), frames, torch.randn(1, 7, 16), torch.device("cpu"))


class Encoder(HaarTokenizer):
    """Its frames would be thrown away."""

    def _decode_chunks(self, ids):
        raise AssertionError("decoded for nothing")


def test_the_diffusion_decoder_makes_the_frames(clips, decoder):
    pipeline = VideoPipeline(
        CachedNetwork(random_weights(ARCH), ARCH, LAYOUT, NO_GROUP), lambda: Encoder(25), decoder=decoder
    )
    made = pipeline.continue_videos(clips[:, :, :9], OPTIONS, [3, 4], num_frames=30)
    for video, seed in zip(made, (3, 4), strict=True):
        assert video.video.shape == (3, 30, 32, 48)
        assert torch.equal(video.video[:, :25], decoder.decode(video.ids[0], seed=seed))
        # The next clip goes on from what is seen, and has noise of its own.
        assert torch.equal(video.ids[1][:2], HaarTokenizer(25).encode(video.video[None, :, 16:25])[0].long())
        second = decoder.decode(video.ids[1], seed=seed + 2**32)
        assert torch.equal(video.video[:, 25:], second[:, 9:14])
        assert not torch.equal(second, decoder.decode(video.ids[1], seed=seed))
    expected = decoder.decode(HaarTokenizer(25).encode(clips[:1])[0], seed=5)
    assert torch.equal(pipeline.round_trip(clips[:1], seed=5)[0], expected)


def test_the_tokenizer_shows_what_the_diffusion_decoder_is_about_to_make(clips, decoder):
    network, shown = CachedNetwork(random_weights(ARCH), ARCH, LAYOUT, NO_GROUP), []
    pipeline = VideoPipeline(network, lambda: HaarTokenizer(25), decoder=decoder)
    (made,) = pipeline.continue_videos(clips[:1, :, :9], OPTIONS, [3], on_frames=shown.append)
    assert [frames.size(2) for frames in shown] == [9, 17, 25]
    assert torch.equal(shown[-1], HaarTokenizer(25).decode(made.ids[0][None]))
    assert torch.equal(made.video, decoder.decode(made.ids[0], seed=3))


def test_each_causal_clip_is_decoded_by_itself(clips, decoder):
    layout = VideoLayout(9, (4, 2, 3), False, 24, 5)
    network = CachedNetwork(random_weights(ARCH), ARCH, layout, NO_GROUP)
    pipeline = VideoPipeline(network, lambda: Encoder(9), decoder=decoder)
    (made,) = pipeline.continue_videos(clips[:1, :, :9], OPTIONS, [0])
    halves = [decoder.decode(half, seed=0) for half in made.ids[0].split(2)]
    assert torch.equal(made.video, torch.cat(halves, 1))
    assert pipeline.round_trip(clips[:1, :, :18]).shape == (1, 3, 18, 32, 48)


def test_the_diffusion_decoder_reads_the_prompt(clips, decoder):
    arch = replace(ARCH, embedding_size=64064, context_size=16)
    layout = replace(LAYOUT, begin_of_video=True, padded_sequence_length=25)
    network = CachedNetwork(random_weights(arch), arch, layout, NO_GROUP)
    pipeline = VideoPipeline(network, lambda: Encoder(25), decoder=decoder)
    text = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    made = pipeline.continue_videos(clips[:, :, :1], OPTIONS, [0, 0], num_frames=10, text=text)
    for video, row in zip(made, text.split(1), strict=True):
        assert torch.equal(video.video, decoder.decode(video.ids[0], row)[:, :10])


def test_what_does_not_fit_is_refused(pipeline):
    def shaped(frames, height=32):
        return torch.zeros(1, 3, frames, height, 48)

    for given, num_frames, message in (
        (shaped(8), None, "8 given frames do not fit"),
        (shaped(25), None, "25 given frames do not fit"),
        (shaped(9, height=16), None, "16x48, but the model makes clips of 32x48"),
        (shaped(9), 9, "leaves nothing to generate"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.continue_videos(given, OPTIONS, [0], num_frames)


def test_weights_that_are_no_numbers_are_told(clips):
    pipeline = make()
    pipeline.network.weights.final_norm[3] = float("nan")
    with pytest.raises(ValueError, match="logits are not finite"):
        pipeline.continue_videos(clips[:1, :, :9], OPTIONS, [0])


def test_gpu_batches_are_limited():
    network = CachedNetwork(random_weights(ARCH), ARCH, LAYOUT, NO_GROUP)
    network.ops = SimpleNamespace(MAX_ROWS=16)
    with pytest.raises(ValueError, match="at most 16"):
        TokenGenerator(network, 17, OPTIONS)
