"""``model/loss.py``'s passes over the logits as Triton kernels: one read forward; one read and one write backward."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _forward(logits_ptr, labels_ptr, lse_ptr, target_ptr, vocab, first, BLOCK: tl.constexpr):  # noqa: D103, N803
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * vocab
    columns = tl.arange(0, BLOCK)
    # Each lane keeps its own maximum and sum, so the lanes meet once per row, not once per block.
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + columns
        value = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, value)
        # A lane that has seen nothing but -inf must not compute inf - inf.
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(highest - safe) + tl.exp(value - safe)
        highest = new
    peak = tl.max(highest, axis=0)
    safe_peak = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(lse_ptr + row, safe_peak + tl.log(tl.sum(total * tl.exp(highest - safe_peak), axis=0)))
    local = tl.load(labels_ptr + row) - first
    owned = (local >= 0) & (local < vocab)
    tl.store(target_ptr + row, tl.load(logits_ptr + local, mask=owned, other=0.0).to(tl.float32))


@triton.jit
def _backward(logits_ptr, labels_ptr, lse_ptr, grad_ce_ptr, grad_lse_ptr, vocab, first, BLOCK: tl.constexpr):  # noqa: D103, N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    logits_ptr += row * vocab
    grad_ce = tl.load(grad_ce_ptr + row)
    scale = grad_ce + tl.load(grad_lse_ptr + row)
    local = tl.load(labels_ptr + row) - first
    value = tl.load(logits_ptr + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    grad = tl.exp(value - tl.load(lse_ptr + row)) * scale
    grad = tl.where(at == local, grad - grad_ce, grad)
    tl.store(logits_ptr + at, grad.to(logits_ptr.dtype.element_ty), mask=at < vocab)


def log_sum_exp_and_target(logits: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Per row of contiguous [rows, V] logits: log-sum-exp, and the logit of the label.

    Args:
        logits: this rank's part of the vocabulary, which begins with id ``first``.
        labels: [rows] int64 ids of the whole vocabulary.
        first: see above.

    Returns:
        Float32 [rows] each; the target is 0 where the label belongs to another rank.
    """
    rows, vocab = logits.shape
    lse, target = torch.empty((2, rows), dtype=torch.float32, device=logits.device).unbind(0)
    _forward[(rows,)](logits, labels, lse, target, vocab, first, BLOCK=_BLOCK, num_warps=8)
    return lse, target


def logits_to_gradient_(
    logits: Tensor, labels: Tensor, first: int, log_sum_exp: Tensor, grad_ce: Tensor, grad_lse: Tensor
) -> Tensor:
    """Replaces contiguous [rows, V] logits by the loss's gradient with respect to them.

    Args:
        logits: as above; overwritten.
        labels: as above.
        first: as above.
        log_sum_exp: float32 [rows] over the whole vocabulary.
        grad_ce: float32 [rows], the loss's derivative by each row's cross entropy.
        grad_lse: likewise by its log-sum-exp.

    Returns:
        ``logits``.
    """
    rows, vocab = logits.shape
    _backward[(rows, triton.cdiv(vocab, _BLOCK))](
        logits, labels, log_sum_exp, grad_ce, grad_lse, vocab, first, BLOCK=_BLOCK, num_warps=8
    )
    return logits
