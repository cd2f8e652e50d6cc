"""A linear layer whose weight is packed NF4, with an optional LoRA branch, as one autograd function.

    y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ,        W = dequantise(packed)

Composed from separate operations, autograd keeps the input of every product: x for the frozen weight, x again
(cast and dropped) for A, and z = x Aᵀ for B. Here the forward saves x, A and B only. The backward dequantises W
once more for dX and recomputes the rank-sized z, which costs r/out of the forward and no memory:

    dz = s · dY B        dB = s · dYᵀ z        dA = dzᵀ drop(x)        dX = dY W + undrop(dz A)

Dropout keeps no mask either: it is drawn from a generator seeded by one number taken from the global CPU
generator, and drawn again in the backward.

QLoRA is Dettmers et al. 2023 (arXiv:2305.14314); the packing is bitsandbytes' own.

Shapes: T tokens (leading dimensions flattened), I input features, O output features, R rank.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from torch import Tensor


def dequantize(packed: Tensor, quant_state: QuantState, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [O, I] in `dtype` of a packed 4-bit one."""
    shape = quant_state.shape
    if shape[-1] % quant_state.blocksize:
        # As one row: on CPUs with AVX-512, bitsandbytes 0.50.2 gives rows that are no whole number of blocks the
        # scales of others.
        quant_state = copy.copy(quant_state)
        quant_state.shape = torch.Size((1, shape.numel()))
    return dequantize_4bit(packed.view(-1, 1), quant_state).view(shape).to(dtype)  # type: ignore[no-any-return]


def as_trained(weight_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a dense weight [O, I] as training sees it: cast to `dtype`, packed in NF4, and unpacked to `dtype`."""
    packed, state = quantize_4bit(
        weight_OI.to(dtype).contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return dequantize(packed, state, dtype)


def nf4_lora_linear_reference(
    x: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None = None,
    lora_a_RI: Tensor | None = None,
    lora_b_OR: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """The same function on a dense weight, differentiated by autograd: what the fast path must equal. No dropout."""
    y = torch.nn.functional.linear(x, weight_OI, bias_O)
    if lora_a_RI is not None and lora_b_OR is not None:
        y = y + scaling * ((x @ lora_a_RI.T) @ lora_b_OR.T)
    return y


def _kept(shape: torch.Size, like: Tensor, probability: float, seed: int) -> Tensor:
    """Inverted-dropout factors: 0, or 1 / (1 - probability)."""
    generator = torch.Generator(like.device).manual_seed(seed)
    kept = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - probability, generator=generator)
    return kept.div_(1 - probability)


class _NF4LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        packed: Tensor,
        quant_state: QuantState,
        bias_O: Tensor | None,
        lora_a_RI: Tensor | None,
        lora_b_OR: Tensor | None,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        # The output must not be a view: a model may add to it in place, which a custom function forbids on views.
        y = torch.nn.functional.linear(x, dequantize(packed, quant_state, x.dtype), bias_O)
        seed = 0
        if lora_a_RI is not None and lora_b_OR is not None:
            if dropout:
                seed = int(torch.randint(2**62, ()).item())
            dropped_TI = x_TI * _kept(x_TI.shape, x_TI, dropout, seed) if dropout else x_TI
            z_TR = dropped_TI @ lora_a_RI.to(x.dtype).T
            y.view(-1, y.shape[-1]).addmm_(z_TR, lora_b_OR.to(x.dtype).T, alpha=scaling)
            ctx.save_for_backward(x_TI, packed, lora_a_RI, lora_b_OR)
        else:
            ctx.save_for_backward(None, packed, None, None)
        ctx.quant_state, ctx.scaling, ctx.dropout, ctx.seed, ctx.shape = quant_state, scaling, dropout, seed, x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, packed, lora_a_RI, lora_b_OR = ctx.saved_tensors
        dy_TO = grads[0].reshape(-1, grads[0].shape[-1])
        dtype = dy_TO.dtype
        dx_TI = d_lora_a = d_lora_b = None
        if ctx.needs_input_grad[0]:
            dx_TI = dy_TO @ dequantize(packed, ctx.quant_state, dtype)
        if lora_a_RI is not None:
            a_RI, b_OR = lora_a_RI.to(dtype), lora_b_OR.to(dtype)
            kept_TI = _kept(x_TI.shape, x_TI, ctx.dropout, ctx.seed) if ctx.dropout else None
            dropped_TI = x_TI if kept_TI is None else x_TI * kept_TI
            dz_TR = (dy_TO @ b_OR).mul_(ctx.scaling)
            if ctx.needs_input_grad[5]:
                d_lora_b = (dy_TO.T @ (dropped_TI @ a_RI.T)).mul_(ctx.scaling).to(lora_b_OR.dtype)
            if ctx.needs_input_grad[4]:
                d_lora_a = (dz_TR.T @ dropped_TI).to(lora_a_RI.dtype)
            if dx_TI is not None:
                dx_TI = dx_TI.addmm_(dz_TR, a_RI) if kept_TI is None else dx_TI.add_((dz_TR @ a_RI).mul_(kept_TI))
        dx = None if dx_TI is None else dx_TI.view(ctx.shape)
        return dx, None, None, None, d_lora_a, d_lora_b, None, None


def nf4_lora_linear(
    x: Tensor,
    packed: Tensor,
    quant_state: QuantState,
    bias_O: Tensor | None = None,
    lora_a_RI: Tensor | None = None,
    lora_b_OR: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Apply a packed 4-bit linear layer and, when given, its LoRA branch.

    Args:
        x: [..., I], float32 or bfloat16; all products are computed in its dtype.
        packed, quant_state: the weight as bitsandbytes packs it, of shape [O, I] before packing. It gets no gradient.
        bias_O: [O] or None; frozen.
        lora_a_RI, lora_b_OR: [R, I] and [O, R], any float dtype; their gradients come in that dtype.
        scaling: s, alpha / rank in plain LoRA.
        dropout: probability in [0, 1) with which an element of x is dropped before A.

    Returns:
        [..., O] in x's dtype.
    """
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    return _NF4LoraLinear.apply(  # type: ignore[no-any-return,no-untyped-call]
        x, packed, quant_state, bias_O, lora_a_RI, lora_b_OR, scaling, dropout
    )
