"""First version (being refined): training-free causal 8x16x16 tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos_mcore.tokenizer.base import VideoTokenizer
from cosmos_mcore.tokenizer.fsq import digits_to_ids, ids_to_digits


class HaarTokenizer(VideoTokenizer):
    """Mean colour of each 16x16 cell of every 8th frame."""

    @property
    def fingerprint(self) -> str:
        return f"haar-0-chunk{self.pixel_chunk_duration}"

    def _encode_chunks(self, video: Tensor) -> Tensor:
        frames = video[:, :, ::8].float()
        cells = torch.nn.functional.avg_pool3d(frames, (1, 16, 16)) * 0.5 + 0.5
        r, g, b = cells.unbind(1)
        y = 0.299 * r + 0.587 * g + 0.114 * b
        cb, cr = 0.564 * (b - y), 0.713 * (r - y)
        zero = torch.zeros_like(y)
        z = torch.stack([y * 8, zero, zero, cb * 5 + 2.5, cr * 5 + 2.5, zero], 1).floor().to(torch.int32)
        top = torch.tensor([7, 7, 7, 4, 4, 4], dtype=torch.int32, device=z.device).view(1, 6, 1, 1, 1)
        return digits_to_ids(torch.minimum(z.clamp(min=0), top))

    def _decode_chunks(self, ids: Tensor) -> Tensor:
        y, _, _, cb, cr, _ = ids_to_digits(ids).float().unbind(1)
        y, cb, cr = (y + 0.5) / 8, (cb - 2) / 5, (cr - 2) / 5
        r, b = y + cr / 0.713, y + cb / 0.564
        g = (y - 0.299 * r - 0.114 * b) / 0.587
        video = torch.stack([r, g, b], 1).clamp(0, 1) * 2 - 1
        video = video.repeat_interleave(8, dim=2)[:, :, 7:]
        return video.repeat_interleave(16, dim=3).repeat_interleave(16, dim=4)
