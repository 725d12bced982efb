"""Which positions count in the loss (spec/model.md section 7)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from cosmos_mcore.config.derived import VideoLayout, derive_video_layout
from cosmos_mcore.config.schema import RunConfig
from cosmos_mcore.model.loss import TokenLosses
from cosmos_mcore.model.presets import PRESETS
from cosmos_mcore.training.step import LossPositions

TINY, CPU = PRESETS["tiny"], torch.device("cpu")


@pytest.mark.parametrize(
    ("height", "width", "ce", "z"), [(384, 640, 3840, 4799), (640, 848, 8480, 10599), (640, 1024, 10240, 12799)]
)
def test_counts_of_the_originals_experiments(height, width, ce, z):
    config = RunConfig()
    config.data.height, config.data.width = height, width
    layout = derive_video_layout(config)
    positions = LossPositions(layout, TINY, 1e-4, CPU)
    assert positions.in_ce.sum() == layout.num_loss_positions == ce
    assert positions.in_z.sum() == layout.num_z_loss_positions == z


@given(st.integers(1, 3), st.integers(0, 5), st.booleans(), st.integers(0, 1000))
def test_against_the_definition(batch, padding, begin_of_video, seed):
    shape, vocab, coeff = (3, 2, 2), 11, 0.01
    ignored = 4 - (not begin_of_video)
    layout = VideoLayout(9, shape, begin_of_video, 12 + begin_of_video + padding, ignored)
    positions = LossPositions(layout, TINY, coeff, CPU)
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(vocab, (batch, 12), generator=generator)
    logits = torch.randn(batch, layout.padded_sequence_length, vocab, generator=generator)
    inputs, labels = positions.batch(video)
    assert inputs.shape == labels.shape == logits.shape[:2]
    row = torch.cat((torch.full((batch, 1), TINY.vocab_size), video), 1) if begin_of_video else video
    assert torch.equal(inputs[:, : row.size(1)], row)

    ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten() % vocab, reduction="none").view_as(labels)
    total, report = positions.reduce(TokenLosses(ce, logits.logsumexp(-1)))

    kept, targets = logits[:, : row.size(1) - 1], row[:, 1:].clone()
    expected_z = coeff * kept.logsumexp(-1).square().mean()
    targets[:, :ignored] = -100
    expected_ce = F.cross_entropy(kept.flatten(0, 1), targets.flatten(), ignore_index=-100)
    assert report["losses"].tolist() == pytest.approx([expected_ce.item(), expected_z.item()], rel=1e-5)
    assert total.item() == pytest.approx((expected_ce + expected_z).item(), rel=1e-5)


def test_padding_has_no_influence():
    layout = VideoLayout(9, (2, 2, 2), False, 16, 3)
    positions = LossPositions(layout, TINY, 1e-4, CPU)
    losses = torch.zeros(1, 16)
    losses[:, 7:] = 1e9  # the last token predicts nothing either
    total, _ = positions.reduce(TokenLosses(losses, losses))
    assert total == 0
