"""A training-free video tokenizer: no weights, no download, blurry but recognisable pictures.

It describes the video by its frames 0, 8, 16, ... and lets the decoder cross-fade between them. In each 16x16 cell of
such a frame six digits hold, in the colour space YCoCg,

=======  ======  =================================================================
channel  levels  meaning
=======  ======  =================================================================
0        8       mean luma, coarse: upper digit of 40 even steps from black to white
1        8       mean Co (blue to orange), finer steps near grey
2        8       mean Cg (magenta to green), finer steps near grey
3        5       slope of luma, left to right
4        5       slope of luma, top to bottom
5        5       mean luma, fine: lower digit of the 40 steps
=======  ======  =================================================================

packed into one id with the same basis as FSQ. Other splits of the 16 bits were measured; see docs/tokenizers.md.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos_mcore.config.derived import SPATIAL_COMPRESSION as CELL
from cosmos_mcore.config.derived import TEMPORAL_COMPRESSION as GROUP
from cosmos_mcore.tokenizer.base import VideoTokenizer
from cosmos_mcore.tokenizer.fsq import LEVELS, digits_to_ids, ids_to_digits

_VERSION = 1  # part of the fingerprint: raise it with every change that alters ids

_LUMA_FINE = LEVELS[5]
_LUMA_STEPS = LEVELS[0] * _LUMA_FINE - 1
# Lloyd-Max levels for 70 % real driving clips, 25 % saturated moving shapes and 5 % evenly spread values, with one
# level pinned to zero (grey stays grey, flat stays flat), then rounded. Luma and colours lie in 0..1 and -0.5..0.5.
_ORANGE = (-0.40, -0.19, -0.11, -0.035, 0.0, 0.06, 0.15, 0.39)
_GREEN = (-0.40, -0.24, -0.11, -0.03, 0.0, 0.03, 0.15, 0.37)
_SLOPE = (-0.27, -0.075, 0.0, 0.075, 0.27)  # luma at the cell's edge minus luma at its centre

_LUMA_FADE = 5  # pixels on either side of a border between cells over which their planes fade into each other
_COLOUR_BY_LUMA = 0.1  # difference in luma at which a cell's colour hardly counts any more


class HaarTokenizer(VideoTokenizer):
    """Mean colour and luma slopes of each cell of every 8th frame; see the module's text."""

    @property
    def fingerprint(self) -> str:
        """Version of the method and chunk length."""
        return f"haar-v{_VERSION}-chunk{self.pixel_chunk_duration}"

    def _encode_chunks(self, video: Tensor) -> Tensor:
        red, green, blue = (video[:, :, ::GROUP].to(torch.float32) * 0.5 + 0.5).unbind(1)
        luma = _cells((red + blue) / 4 + green / 2)
        ramp = _ramp(video.device)
        power = ramp.square().mean()
        # A mid-grey ground lies exactly between two steps of luma: 0.501 decides that tie alike on every device.
        step = (luma.mean((-2, -1)) * _LUMA_STEPS + 0.501).floor().clamp(0, _LUMA_STEPS).to(torch.int32)
        digits = [
            step // _LUMA_FINE,
            _nearest(_cells((red - blue) / 2).mean((-2, -1)), _ORANGE),
            _nearest(_cells(green / 2 - (red + blue) / 4).mean((-2, -1)), _GREEN),
            _nearest((luma.mean(-2) * ramp).mean(-1) / power, _SLOPE),
            _nearest((luma.mean(-1) * ramp).mean(-1) / power, _SLOPE),
            step % _LUMA_FINE,
        ]
        return digits_to_ids(torch.stack(digits, dim=1))

    def _decode_chunks(self, ids: Tensor) -> Tensor:
        coarse, orange, green, slope_x, slope_y, fine = ids_to_digits(ids).unbind(1)
        means = (coarse * _LUMA_FINE + fine).to(torch.float32) / _LUMA_STEPS
        luma = _blend_planes(means, _look_up(slope_x, _SLOPE), _look_up(slope_y, _SLOPE))
        orange, green = _spread_colours(torch.stack([_look_up(orange, _ORANGE), _look_up(green, _GREEN)]), means, luma)
        frames = torch.stack([luma + orange - green, luma + green, luma - orange - green], dim=1).clamp_(0, 1) * 2 - 1
        share = (torch.arange(1, GROUP + 1, dtype=torch.float32, device=ids.device) / GROUP)[:, None, None]
        between = torch.lerp(frames[:, :, :-1, None], frames[:, :, 1:, None], share)
        return torch.cat([frames[:, :, :1], between.flatten(2, 3)], dim=2)


def _blend_planes(means: Tensor, slopes_x: Tensor, slopes_y: Tensor) -> Tensor:
    """Luma [N, T, 16h, 16w]: the plane of each cell [N, T, h, w], faded into its neighbours' near the borders."""
    rows, rows_ramp = _fade_matrices(means.shape[-2], means.device)
    columns, columns_ramp = _fade_matrices(means.shape[-1], means.device)
    return rows @ (means @ columns.T + slopes_x @ columns_ramp.T) + rows_ramp @ slopes_y @ columns.T


def _fade_matrices(cells: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, how much each cell counts at each pixel, and that times the pixel's position in the cell's ramp.

    Returns:
        Two matrices [16·cells, cells].
    """
    pixels = torch.arange(CELL * cells, dtype=torch.float32, device=device)[:, None] + 0.5
    distance = pixels - (torch.arange(cells, dtype=torch.float32, device=device) + 0.5) * CELL
    weight = (0.5 - (distance.abs() - CELL / 2) / (2 * _LUMA_FADE)).clamp(0, 1)
    weight /= weight.sum(dim=1, keepdim=True)  # at the picture's border there is no neighbour to fade into
    # Beyond its own border a plane goes on level: shapes get no dark or bright halo.
    return weight, weight * (distance / (CELL / 2)).clamp(-1, 1)


def _spread_colours(colours: Tensor, means: Tensor, luma: Tensor) -> Tensor:
    """Colors [2, N, T, 16h, 16w] of all pixels from those of the cells [2, N, T, h, w].

    Of the cells around a pixel, near ones count most (as in bilinear interpolation), and of these, those whose mean
    luma is like the pixel's. So colours follow luma's edges: joint bilateral upsampling (Kopf et al. 2007).
    """
    height, width = means.shape[-2:]
    luma = _cells(luma)
    cells = F.pad(torch.cat([colours, means[None], torch.ones_like(means)[None]]), (1, 1, 1, 1))
    colours_total, weights_total = torch.zeros_like(luma).expand(2, *luma.shape).clone(), torch.zeros_like(luma)
    near = {step: (1 - (_ramp(luma.device) / 2 - step).abs()).clamp(min=0) for step in (-1, 0, 1)}
    for dy, dx in itertools.product(near, repeat=2):
        shifted = cells[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width, None, None]
        colour, mean, inside = shifted[:2], shifted[2], shifted[3]
        alike = torch.exp(-(((luma - mean) / _COLOUR_BY_LUMA) ** 2)) + 1e-3
        weight = alike * inside * near[dy][:, None] * near[dx]
        colours_total += colour * weight
        weights_total += weight
    return _uncells(colours_total / weights_total)


def _cells(pixels: Tensor) -> Tensor:
    """[..., 16h, 16w] to [..., h, w, 16, 16]."""
    return pixels.unflatten(-1, (-1, CELL)).unflatten(-3, (-1, CELL)).transpose(-3, -2)


def _uncells(cells: Tensor) -> Tensor:
    """[..., h, w, 16, 16] to [..., 16h, 16w]."""
    return cells.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def _ramp(device: torch.device) -> Tensor:
    """Positions of a cell's 16 pixels, -1 at its left or upper edge, 1 at the other."""
    return (torch.arange(CELL, dtype=torch.float32, device=device) + 0.5) * (2 / CELL) - 1


def _nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The number of the nearest level, int32."""
    table = torch.tensor(levels, dtype=torch.float32, device=values.device)
    return torch.bucketize(values, (table[1:] + table[:-1]) / 2).to(torch.int32)


def _look_up(digits: Tensor, levels: tuple[float, ...]) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=digits.device)[digits]
