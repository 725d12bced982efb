"""Vocab-parallel cross entropy and log-sum-exp in one pass, and the loss made of them (spec/model.md section 7)."""

from __future__ import annotations

import sys
from types import ModuleType
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
    """Keeps the logits in their own dtype and one float32 number per row; the gradient overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.functions = _functions(logits.is_cuda)
        first = group.rank() * logits.size(1)
        log_sum_exp, target = ctx.functions.log_sum_exp_and_target(logits, labels, first)
        if group.size() > 1:
            mine = torch.stack((log_sum_exp, target))
            parts = mine.new_empty((group.size(), *mine.shape))
            dist.all_gather(list(parts.unbind(0)), mine, group=group)
            log_sum_exp, target = torch.logsumexp(parts[:, 0], dim=0), parts[:, 1].sum(dim=0)
        ctx.save_for_backward(logits, labels, log_sum_exp)
        ctx.first = first
        return log_sum_exp - target, log_sum_exp

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor, grad_lse: Tensor) -> tuple[Tensor, None, None]:
        logits, labels, log_sum_exp = ctx.saved_tensors
        grads = grad_ce.contiguous(), grad_lse.contiguous()
        return ctx.functions.logits_to_gradient_(logits, labels, ctx.first, log_sum_exp, *grads), None, None


def _functions(on_gpu: bool) -> ModuleType:
    if not on_gpu:
        return sys.modules[__name__]
    from cosmos_mcore.model import loss_kernel  # needs Triton, which CPUs do not have

    return loss_kernel


def log_sum_exp_and_target(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """As ``loss_kernel``'s, in torch: the reference, and what runs on CPUs."""
    rows, vocab = logits.shape
    local = labels - first
    owned = (local >= 0) & (local < vocab)
    target = torch.gather(logits, 1, local.clamp(0, vocab - 1)[:, None])[:, 0].float().masked_fill_(~owned, 0.0)
    log_sum_exp = torch.empty(rows, dtype=torch.float32, device=logits.device)
    for part in _slices(rows, vocab):
        log_sum_exp[part] = torch.logsumexp(logits[part].float(), dim=-1)
    return log_sum_exp, target


def logits_to_gradient_(
    logits: Tensor, labels: Tensor, first: int, log_sum_exp: Tensor, grad_ce: Tensor, grad_lse: Tensor
) -> Tensor:
    """As ``loss_kernel``'s, in torch."""
    rows, vocab = logits.shape
    local = labels - first
    owned = (local >= 0) & (local < vocab)
    local, at_label = local.clamp(0, vocab - 1)[:, None], -(grad_ce * owned)[:, None]
    scale = (grad_ce + grad_lse)[:, None]
    for part in _slices(rows, vocab):
        gradient = torch.exp(logits[part].float() - log_sum_exp[part, None]).mul_(scale[part])
        logits[part] = gradient.scatter_add_(1, local[part], at_label[part]).to(logits.dtype)
    return logits


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def vocab_parallel_losses(logits: Tensor, labels: Tensor, group: dist.ProcessGroup) -> TokenLosses:
    """Cross entropy and log-sum-exp of every token, in float32 whatever the dtype of the logits.

    Args:
        logits: [S, B, V / TP], this rank's part of the vocabulary; the backward pass overwrites them.
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
