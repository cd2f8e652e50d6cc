"""Cross-entropy over a large vocabulary without ever holding all logits.

The logits of a long row are the largest tensor of a training step: 4,096 tokens over 32,000 words take 0.5 GB in
float32, and autograd keeps several such. The output head is frozen, so only the gradient of its input is needed,
and that can be formed while the logits of a chunk are still at hand:

    loss = Σ (logsumexp(logits) - logits[label]),        dH = (softmax(logits) - onehot(label)) · W

The forward therefore works through chunks of tokens, keeps dH [N, H] when a gradient is wanted, and the backward
only scales it. The same idea is in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) and Cut Cross-Entropy
(Wijmans et al. 2024, arXiv:2411.09009).

A few rows of the head may train, those of tokens that were added to the vocabulary. Their logits are computed apart
and take the place of the frozen rows'; with P = softmax(logits) - onehot(label) and R the trained rows at the places k,

    dH = P[:, ¬k] · W[¬k] + P[:, k] · R,        dR = P[:, k]ᵀ · H

so that W is never copied and gets no gradient of its own size.

Shapes: N trained tokens, H hidden size, V vocabulary, K trained rows of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in float32."""


@dataclass(frozen=True, slots=True)
class HeadRows:
    """Rows of the output head that train, in the place of the frozen ones."""

    ids_K: Tensor
    """[K] int64: which rows, each once."""
    rows_KH: Tensor
    """[K, H], in float32; rounded to the head's dtype where they are used."""


def cross_entropy_sum_reference(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    trained: HeadRows | None = None,
) -> Tensor:
    """The summed cross-entropy by way of all logits: what the chunked path must equal."""
    if trained is not None:
        weight_VH = weight_VH.index_copy(0, trained.ids_K, trained.rows_KH.to(weight_VH.dtype))
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V).float()
    return torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        labels_N: Tensor,
        bias_V: Tensor | None,
        ids_K: Tensor | None,
        rows_KH: Tensor | None,
    ) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // weight_VH.shape[0])
        d_hidden_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        d_rows_KH = None
        if rows_KH is not None and ctx.needs_input_grad[5]:
            d_rows_KH = torch.zeros_like(rows_KH, dtype=torch.float32)
        own = None if ids_K is None or rows_KH is None else HeadRows(ids_K, rows_KH.to(weight_VH.dtype))
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            labels = labels_N[part].unsqueeze(1)
            logits = torch.nn.functional.linear(hidden_NH[part], weight_VH, bias_V)
            if own is not None:
                bias_K = None if bias_V is None else bias_V[own.ids_K]
                logits.index_copy_(1, own.ids_K, torch.nn.functional.linear(hidden_NH[part], own.rows_KH, bias_K))
            logits = logits.float()
            log_norm = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (log_norm - logits.gather(1, labels)).sum()
            if d_hidden_NH is None and d_rows_KH is None:
                continue
            probability = logits.sub_(log_norm).exp_()
            probability.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=probability.dtype))
            if own is not None:
                probability_NK = probability.index_select(1, own.ids_K)
                probability.index_fill_(1, own.ids_K, 0)
                if d_rows_KH is not None:
                    d_rows_KH += probability_NK.T @ hidden_NH[part].float()
            if d_hidden_NH is not None:
                d_hidden_NH[part] = probability.to(weight_VH.dtype) @ weight_VH
                if own is not None:
                    d_hidden_NH[part] += probability_NK.to(weight_VH.dtype) @ own.rows_KH
        ctx.save_for_backward(d_hidden_NH, d_rows_KH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden_NH, d_rows_KH = (d if d is None else d * grads[0].to(d.dtype) for d in ctx.saved_tensors)
        return d_hidden_NH, None, None, None, None, d_rows_KH


def cross_entropy_sum(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    bias_V: Tensor | None = None,
    trained: HeadRows | None = None,
) -> Tensor:
    """Summed cross-entropy of `hidden_NH @ weight_VH.T` against `labels_N`, as a float32 scalar.

    Args:
        hidden_NH: [N, H], the final hidden states at the positions that predict a trained token.
        weight_VH: [V, H], the output head; frozen, it gets no gradient.
        labels_N: [N] int64, the token to predict at each position.
        bias_V: [V] or None; frozen.
        trained: rows of the head that train; they get their gradient in float32.
    """
    ids_K, rows_KH = (None, None) if trained is None else (trained.ids_K, trained.rows_KH)
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden_NH, weight_VH, labels_N, bias_V, ids_K, rows_KH
    )
