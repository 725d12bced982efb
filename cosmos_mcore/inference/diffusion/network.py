"""The diffusion decoder's network, a transformer over latent video (spec/inference.md section 6).

Parameter names and shapes are the released ones. Positions lie t-major, [B, T*h*w, channels]; all rows of a batch
have the same noise level, so the layers' shifts, scales and gates are computed once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_mcore.inference.diffusion import fp8
from cosmos_mcore.inference.diffusion.attention import Attention
from cosmos_mcore.inference.diffusion.rotary import FPS, rotary_table

LATENT_CHANNELS = 16
PATCH = 2  # latent pixels of a position in height and width
_EPS = 1.0e-6
_MLP_RATIO = 4


@dataclass(frozen=True)
class DiffusionSize:
    """Size of the network; the defaults are the release's.

    Attributes:
        channels: width.
        blocks: number of blocks.
        heads: attention heads.
        adaln_rank: rank of the matrices that make shifts, scales and gates from the noise level.
        vocab_size: ids are 0..vocab_size-1.
        token_channels: numbers that the network keeps for each id.
        text_channels: numbers of each row of the text's embedding.
    """

    channels: int = 4096
    blocks: int = 28
    heads: int = 32
    adaln_rank: int = 256
    vocab_size: int = 64000
    token_channels: int = 32
    text_channels: int = 1024

    @property
    def input_channels(self) -> int:
        """Of each latent pixel: noisy latent, id, padding mask."""
        return LATENT_CHANNELS + self.token_channels + 1


class DiffusionNetwork(nn.Module):
    """Predicts what the sampler needs to take noise out of a latent video, given ids and a text."""

    def __init__(self, size: DiffusionSize, group: dist.ProcessGroup | None = None) -> None:
        """Makes the layers without initial values.

        Args:
            size: of the network.
            group: ranks that share the latent frames, each a contiguous part; None: this process has all.
        """
        super().__init__()
        self.size = size
        self.group = group
        width = size.channels
        patch_numbers = size.input_channels * PATCH**2
        self.x_embedder = _Embedder(patch_numbers, width)
        self.token_embedder = nn.Embedding(size.vocab_size, size.token_channels)
        self.t_embedder = nn.Sequential(nn.Identity(), _NoiseLevel(width))
        self.affline_norm = nn.RMSNorm(width, eps=_EPS)
        self.blocks = nn.ModuleDict({f"block{number}": _Block(size, group) for number in range(size.blocks)})
        self.final_layer = _FinalLayer(width, size.adaln_rank)

    def forward(
        self,
        latent: Tensor,
        tokens: Tensor,
        text: Tensor,
        c_noise: float,
        *,
        fps: float = FPS,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Predicts, for each row of ids, from the same latent.

        Args:
            latent: [1, 16, T, 2h, 2w], scaled by the sampler; T are this rank's frames.
            tokens: ids [B, T, h, w], int64.
            text: embeddings [C, M, text_channels] of the first C <= B rows. The rest have none, which is the same as
                zeros: keys and values without biases are zero then, and so is what attention adds. It is skipped.
            c_noise: ln(noise level) / 4.
            fps: frames per second of the video.
            padding_mask: [1, 1, H, W], any size; 1 where the video has a border that is no picture. None: none.

        Returns:
            [B, 16, T, 2h, 2w] in the dtype of the parameters.
        """
        weight = self.final_layer.linear.weight
        frames, height, width = tokens.shape[1:]
        assert latent.shape == (1, LATENT_CHANNELS, frames, PATCH * height, PATCH * width), latent.shape
        x = self._embed(latent.to(weight.dtype), tokens, padding_mask)
        text = text.to(weight.dtype)
        level = _sinusoids(c_noise, self.size.channels, weight.device).to(weight.dtype)
        lora = self.t_embedder[1](level)
        level = F.silu(self.affline_norm(level))
        rotary = self._rotary((frames, height, width), fps, weight.device)
        for block in self.blocks.values():
            x = block(x, text, level, lora, rotary)
        x = self.final_layer(x, level, lora)
        x = x.unflatten(2, (PATCH, PATCH, LATENT_CHANNELS)).unflatten(1, (frames, height, width))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def to_fp8(self) -> None:
        """Rounds the weights of the large matrices in the blocks to 8 bits, those that all positions go through."""
        for block in self.blocks.values():
            assert isinstance(block, _Block)
            block.to_fp8()

    def _embed(self, latent: Tensor, tokens: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Joins the inputs of each latent pixel and makes positions [B, T*h*w, channels] of them."""
        batch, frames, height, width = tokens.shape
        fine = (PATCH * height, PATCH * width)
        ids = self.token_embedder(tokens).flatten(0, 1).permute(0, 3, 1, 2)
        ids = F.interpolate(ids.float(), fine, mode="bilinear").to(latent.dtype)
        ids = ids.unflatten(0, (batch, frames)).transpose(1, 2)
        mask = latent.new_zeros(1, 1, *fine)
        if padding_mask is not None:
            mask = F.interpolate(padding_mask.to(latent.dtype), fine, mode="nearest")
        mask = mask[:, :, None].expand(batch, 1, frames, *fine)
        pixels = torch.cat([latent.expand(batch, -1, -1, -1, -1), ids, mask], dim=1)
        patches = pixels.unflatten(4, (width, PATCH)).unflatten(3, (height, PATCH))
        return self.x_embedder(patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))

    def _rotary(self, shape: tuple[int, int, int], fps: float, device: torch.device) -> tuple[Tensor, Tensor]:
        head_dim = self.size.channels // self.size.heads
        if self.group is None:
            return rotary_table(shape, head_dim, fps, device)
        frames, *cells = shape
        cos, sin = rotary_table((frames * self.group.size(), cells[0], cells[1]), head_dim, fps, device)
        mine = slice(self.group.rank() * math.prod(shape), (self.group.rank() + 1) * math.prod(shape))
        return cos[mine], sin[mine]


class _Embedder(nn.Module):
    """Numbers of a patch to a position."""

    def __init__(self, numbers: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(numbers, channels, bias=False))

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches)


class _NoiseLevel(nn.Module):
    """What all layers' shifts, scales and gates share."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, channels, bias=False)
        self.linear_2 = nn.Linear(channels, 3 * channels, bias=False)

    def forward(self, level: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(level)))


class _Block(nn.Module):
    """Self-attention, attention to the text, MLP."""

    def __init__(self, size: DiffusionSize, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        width = size.channels
        to_itself = Attention(width, width, size.heads)
        to_itself.group = group
        to_text = Attention(width, size.text_channels, size.heads)
        mlp = _Mlp(width, _MLP_RATIO * width)
        self.blocks = nn.ModuleList(_Residual(part, size) for part in (_Holder(to_itself), _Holder(to_text), mlp))

    def to_fp8(self) -> None:
        """As ``DiffusionNetwork.to_fp8``."""
        residuals: list[Any] = list(self.blocks)
        to_itself, to_text, mlp = (residual.block for residual in residuals)
        attentions = (to_itself.attn, ("to_q", "to_k", "to_v", "to_out")), (to_text.attn, ("to_q", "to_out"))
        for attention, names in attentions:
            for name in names:
                layers = getattr(attention, name)
                layers[0] = fp8.Fp8Linear(layers[0])
        mlp.layer1, mlp.layer2 = fp8.Fp8Linear(mlp.layer1), fp8.Fp8Linear(mlp.layer2)
        mlp.hidden = fp8.with_gelu
        for residual in residuals:
            residual.norm = fp8.modulated_norm

    def forward(self, x: Tensor, text: Tensor, level: Tensor, lora: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Changes ``x`` [B, S, channels] in place and returns it."""
        to_itself, to_text, mlp = self.blocks
        to_itself(x, level, lora, None, rotary)
        to_text(x[: len(text)], level, lora, text)
        return mlp(x, level, lora)


class _Residual(nn.Module):
    """A part of a block, with the matrices that say how far to shift and scale its input and how much to add of it."""

    def __init__(self, block: _Holder | _Mlp, size: DiffusionSize) -> None:
        super().__init__()
        self.block = block
        self.adaLN_modulation = _modulation(size.channels, size.adaln_rank, 3)
        self.norm: Callable[..., Any] = _modulated_norm

    def forward(self, x: Tensor, level: Tensor, lora: Tensor, *inputs: Any) -> Tensor:
        """Adds to ``x`` [B, S, channels] in place; ``inputs`` are the part's own."""
        shift, scale, gate = (self.adaLN_modulation(level) + lora)[0].chunk(3)
        inner, last = self.block(self.norm(x, shift, scale, _EPS), *inputs), self.block.last
        if not isinstance(last, nn.Linear):
            return x.addcmul_(gate, last(inner))
        # All rows have one gate, so the matrix can have it, and the product can add up where it writes: both cost less
        # than a pass over all positions.
        rows = x.view(-1, x.size(2))
        torch.addmm(rows, inner.flatten(0, 1), _scale_rows(last.weight, gate).t(), out=rows)
        return x


class _Holder(nn.Module):
    """Gives attention its place among the released names."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attn = attention

    @property
    def last(self) -> nn.Module:
        """Takes what ``forward`` gives."""
        return self.attn.to_out[0]

    def forward(self, *inputs: Any) -> Tensor:
        return self.attn(*inputs)


class _Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.layer1 = nn.Linear(channels, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, channels, bias=False)
        self.hidden: Callable[[nn.Linear, Tensor], Any] = _with_gelu

    @property
    def last(self) -> nn.Module:
        """Takes what ``forward`` gives."""
        return self.layer2

    def forward(self, x: Tensor) -> Any:
        return self.hidden(self.layer1, x)


class _FinalLayer(nn.Module):
    """A position to the numbers of its patch."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, LATENT_CHANNELS * PATCH**2, bias=False)
        self.adaLN_modulation = _modulation(channels, rank, 2)

    def forward(self, x: Tensor, level: Tensor, lora: Tensor) -> Tensor:
        shift, scale = (self.adaLN_modulation(level) + lora[:, : 2 * x.size(-1)])[0].chunk(2)
        return self.linear(_modulated_norm(x, shift, scale, _EPS))


def flops_per_call(
    size: DiffusionSize, positions: int, batch: int, with_text: int, text_rows: int
) -> tuple[float, float]:
    """Floating-point operations of one call; what is computed once per call is left out.

    Args:
        size: of the network.
        positions: T*h*w of all ranks together.
        batch: rows.
        with_text: rows with a text.
        text_rows: rows of the text's embedding.

    Returns:
        Those of the matrices, and those of attention.
    """
    width = size.channels
    per_row, per_told_row = (4 + 2 * _MLP_RATIO) * width**2, 2 * width**2
    matrices = positions * (batch * per_row + with_text * per_told_row)
    matrices += with_text * 2 * size.text_channels * width * text_rows
    patches = batch * positions * (size.input_channels + LATENT_CHANNELS) * PATCH**2 * width
    attention = 2 * width * positions * (batch * positions + with_text * text_rows)
    return 2.0 * (size.blocks * matrices + patches), 2.0 * size.blocks * attention


def _modulation(channels: int, rank: int, parts: int) -> nn.Sequential:
    # The released numbering counts a SiLU first, which is the same for all and so applied before.
    return nn.Sequential(
        nn.Identity(), nn.Linear(channels, rank, bias=False), nn.Linear(rank, parts * channels, bias=False)
    )


def _modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Layer norm, times one plus the scale, plus the shift."""
    if x.is_cuda:
        from cosmos_mcore.inference.diffusion import kernels

        return kernels.modulated_norm(x, shift, scale, eps)
    return F.layer_norm(x, x.shape[-1:], 1 + scale, shift, eps)


def _scale_rows(matrix: Tensor, factors: Tensor) -> Tensor:
    """``matrix`` [N, K] with each row times its factor [N]."""
    if matrix.is_cuda:  # at the speed of memory, which torch's own kernel halves where it repeats the factors
        from cosmos_mcore.inference.diffusion import kernels

        return kernels.scale_rows(matrix, factors)
    return matrix * factors[:, None]


def _with_gelu(layer: nn.Linear, x: Tensor) -> Tensor:
    """GELU of a layer's product with ``x`` [B, S, K].

    In bfloat16 on a GPU it is cuBLAS's, inside the product, which saves a pass over the widest tensor. That is GELU's
    tanh form, 2e-4 off, but of sums that nobody has rounded yet: rounding these to bfloat16 costs 2e-3.
    """
    if not (x.is_cuda and x.dtype == torch.bfloat16):
        return F.gelu(layer(x))
    zeros = layer.weight.new_zeros(layer.out_features)
    out = torch._addmm_activation(zeros, x.flatten(0, 1), layer.weight.t(), use_gelu=True)
    return out.view(*x.shape[:2], -1)


def _sinusoids(c_noise: float, channels: int, device: torch.device) -> Tensor:
    """Cosines and sines of the noise level at falling frequencies, float32 [1, channels]."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=device) * (-math.log(10000.0) / half))
    angles = c_noise * frequencies
    return torch.cat([angles.cos(), angles.sin()])[None]
