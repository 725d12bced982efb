"""Vocab-parallel cross entropy and log-sum-exp in one pass, and the loss made of them (spec/model.md section 7)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_ELEMENTS = 2**25  # logits turned into float32 at a time: 128 MiB


class TokenLosses(NamedTuple):
    """Per token, float32, [B, S] each: cross entropy, not masked, and log-sum-exp of the logits."""

    cross_entropy: Tensor
    log_sum_exp: Tensor


class _VocabParallelLosses(torch.autograd.Function):
    """Keeps the logits in their own dtype and one float32 number per row; works in float32 on slices of rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        rows, local_vocab = logits.shape
        first = group.rank() * local_vocab
        local = labels - first
        owned = (local >= 0) & (local < local_vocab)
        local = local.clamp(0, local_vocab - 1)
        log_sum_exp = torch.empty(rows, dtype=torch.float32, device=logits.device)
        target = torch.gather(logits, 1, local[:, None])[:, 0].float().masked_fill_(~owned, 0.0)
        for part in _slices(rows, local_vocab):
            log_sum_exp[part] = torch.logsumexp(logits[part].float(), dim=-1)
        if group.size() > 1:
            parts = torch.empty(group.size(), rows, dtype=torch.float32, device=logits.device)
            dist.all_gather(list(parts.unbind(0)), log_sum_exp, group=group)
            log_sum_exp = torch.logsumexp(parts, dim=0)
            dist.all_reduce(target, group=group)
        ctx.save_for_backward(logits, local, owned, log_sum_exp)
        return log_sum_exp - target, log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None]:
        logits, local, owned, log_sum_exp = ctx.saved_tensors
        grad = torch.empty_like(logits)
        scale = (grad_ce + grad_lse)[:, None]
        for part in _slices(*logits.shape):
            probabilities = torch.exp(logits[part].float() - log_sum_exp[part, None])
            slice_grad = probabilities.mul_(scale[part])
            slice_grad.scatter_add_(1, local[part, None], -(grad_ce[part] * owned[part])[:, None])
            grad[part] = slice_grad.to(grad.dtype)
        return grad, None, None


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def vocab_parallel_losses(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> TokenLosses:
    """Cross entropy and log-sum-exp of every token, in float32 whatever the dtype of the logits.

    Args:
        logits: [S, B, V / TP], this rank's part of the vocabulary.
        labels: [B, S] int64 ids of the whole vocabulary.
        group: the tensor-parallel group.

    Returns:
        [B, S] float32 each, equal on all ranks of ``group``.
    """
    length, batch, local_vocab = logits.shape
    losses = _VocabParallelLosses.apply(
        logits.reshape(length * batch, local_vocab), labels.transpose(0, 1).reshape(-1), group
    )
    return TokenLosses(*(loss.view(length, batch).transpose(0, 1) for loss in losses))
