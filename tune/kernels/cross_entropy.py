"""Cross-entropy over a large vocabulary without ever holding all logits.

The logits of a long row are the largest tensor of a training step: 4,096 tokens over 32,000 words take 0.5 GB in
float32, and autograd keeps several such. The output head is frozen, so only the gradient of its input is needed,
and that can be formed while the logits of a chunk are still at hand:

    loss = Σ (logsumexp(logits) - logits[label]),        dH = (softmax(logits) - onehot(label)) · W

The forward therefore works through chunks of tokens, keeps dH [N, H] when a gradient is wanted, and the backward
only scales it. The same idea is in Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) and Cut Cross-Entropy
(Wijmans et al. 2024, arXiv:2411.09009).

Shapes: N trained tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in float32."""


def cross_entropy_sum_reference(
    hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, bias_V: Tensor | None = None
) -> Tensor:
    """The summed cross-entropy by way of all logits: what the chunked path must equal."""
    logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V).float()
    return torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, bias_V: Tensor | None) -> Tensor:
        chunk = max(1, CHUNK_ELEMENTS // weight_VH.shape[0])
        wanted = ctx.needs_input_grad[0]
        d_hidden_NH = torch.empty_like(hidden_NH) if wanted else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_NH.device)
        for start in range(0, hidden_NH.shape[0], chunk):
            part = slice(start, start + chunk)
            labels = labels_N[part].unsqueeze(1)
            logits = torch.nn.functional.linear(hidden_NH[part], weight_VH, bias_V).float()
            log_norm = torch.logsumexp(logits, dim=1, keepdim=True)
            total += (log_norm - logits.gather(1, labels)).sum()
            if d_hidden_NH is not None:
                probability = logits.sub_(log_norm).exp_()
                probability.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=probability.dtype))
                d_hidden_NH[part] = probability.to(weight_VH.dtype) @ weight_VH
        ctx.save_for_backward(d_hidden_NH)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_hidden_NH,) = ctx.saved_tensors
        return d_hidden_NH * grads[0].to(d_hidden_NH.dtype), None, None, None


def cross_entropy_sum(hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """Summed cross-entropy of `hidden_NH @ weight_VH.T` against `labels_N`, as a float32 scalar.

    Args:
        hidden_NH: [N, H], the final hidden states at the positions that predict a trained token.
        weight_VH: [V, H], the output head; frozen, it gets no gradient.
        labels_N: [N] int64, the token to predict at each position.
        bias_V: [V] or None; frozen.
    """
    return _ChunkedCrossEntropy.apply(  # type: ignore[no-any-return,no-untyped-call]
        hidden_NH, weight_VH, labels_N, bias_V
    )
