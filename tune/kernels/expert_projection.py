"""One of the two linear maps of every expert, with its LoRA: the products for one expert's rows, and their gradients.

    y = x Wᵀ + s · drop(x) Aᵀ Bᵀ        dX = dY W + undrop(s · dY B · A)
    dA = (c · s · dY B)ᵀ drop(x)        dB = dYᵀ (c · s · drop(x) Aᵀ)

where c scales the rows of dY: the router's weight of a slot, which dX here leaves out. Every product that involves A
or B has the rank on one side; neither B·A nor the gradient of W is formed. Dropout keeps no mask, it is drawn again
from (seed, projection, expert).

Shapes: E experts, N rows of one expert (padding included), C input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tune.kernels.nf4_linear import _kept
from tune.kernels.nf4_stack import Stack


def lora_a(a: Tensor, num_experts: int) -> Tensor:
    """View stock PEFT's A, [E·R, C] with rows expert-major, as [E, R, C]."""
    return a.view(num_experts, -1, a.shape[1])


def lora_b(b: Tensor, num_experts: int) -> Tensor:
    """View stock PEFT's B, [O, R·E] with columns rank-major and the expert fastest, as [E, O, R]."""
    return b.view(b.shape[0], -1, num_experts).permute(2, 0, 1)


def dropout_mask(x_NC: Tensor, probability: float, seed: int, number: int, expert: int) -> Tensor:
    """Return the factors 0 or 1 / (1 - probability) of projection `number` for one expert's rows."""
    return _kept(x_NC.shape, x_NC, probability, seed + 2 * expert + number)


class Projection:
    """The maps of all experts, with room for the gradients of one backward."""

    def __init__(
        self,
        number: int,
        shape_EOC: tuple[int, int, int],
        rows_E: Sequence[int],
        stack: Stack,
        lora: tuple[Tensor | None, Tensor | None, float, float],
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        """Take the projection's number and (A, B, scaling, dropout) in PEFT's layout.

        `rows_E` counts each expert's rows; what it is given may have more, for padding, and `dtype` computes.
        """
        self.number, self.shape_EOC, self.stack, self.seed, self.dtype = number, shape_EOC, stack, seed, dtype
        self.rows_E = rows_E
        self.a, self.b, self.scaling, self.dropout = lora
        self.a_ERC: Tensor | None = None
        self.b_EOR: Tensor | None = None
        self.da_ERC: Tensor | None = None
        self.db_EOR: Tensor | None = None
        if self.a is not None and self.b is not None:
            self.a_ERC = lora_a(self.a, shape_EOC[0]).to(dtype)
            self.b_EOR = lora_b(self.b.to(dtype), shape_EOC[0]).contiguous()

    def weight(self, expert: int) -> Tensor:
        """Return one expert's dense weight [O, C]."""
        return self.stack.matrix(expert, *self.shape_EOC[1:], self.dtype)

    def _mask(self, x_NC: Tensor, expert: int) -> Tensor | None:
        if not self.dropout:
            return None
        rows = self.rows_E[expert]
        drawn_NC = dropout_mask(x_NC[:rows], self.dropout, self.seed, self.number, expert)
        return torch.nn.functional.pad(drawn_NC, (0, 0, 0, len(x_NC) - rows))

    def reduce(self, x_NC: Tensor, expert: int) -> Tensor | None:
        """Return drop(x) Aᵀ, [N, R], or None without a LoRA."""
        if self.a_ERC is None:
            return None
        mask_NC = self._mask(x_NC, expert)
        return (x_NC if mask_NC is None else x_NC * mask_NC) @ self.a_ERC[expert].T

    def forward(self, x_NC: Tensor, weight_OC: Tensor, reduced_NR: Tensor | None, expert: int, out_NO: Tensor) -> None:
        """Write y to `out_NO`."""
        torch.mm(x_NC, weight_OC.T, out=out_NO)
        if reduced_NR is not None and self.b_EOR is not None:
            out_NO.addmm_(reduced_NR, self.b_EOR[expert].T, alpha=self.scaling)

    def want_gradients(self, of_a: bool, of_b: bool) -> None:
        """Make room for gradients of A and B; an expert without rows keeps zeros."""
        if self.a_ERC is not None and self.b_EOR is not None:
            self.da_ERC = torch.zeros_like(self.a_ERC, dtype=torch.float32) if of_a else None
            self.db_EOR = torch.zeros_like(self.b_EOR, dtype=torch.float32) if of_b else None

    @property
    def wants_gradients(self) -> bool:
        return self.da_ERC is not None or self.db_EOR is not None

    def backward_lora(
        self, dy_NO: Tensor, x_NC: Tensor, reduced_NR: Tensor | None, expert: int, scale_N1: Tensor | None
    ) -> Tensor | None:
        """Keep the gradients of A and B of one expert, if wanted; `scale_N1` is c above.

        Returns s · dY B, [N, R], for `backward_input`, or None without a LoRA.
        """
        if self.a_ERC is None or self.b_EOR is None:
            return None
        d_reduced_NR = (dy_NO @ self.b_EOR[expert]).mul_(self.scaling)
        if self.da_ERC is not None:
            mask_NC = self._mask(x_NC, expert)
            left_NR = d_reduced_NR if scale_N1 is None else (d_reduced_NR * scale_N1).to(dy_NO.dtype)
            self.da_ERC[expert] = left_NR.T @ (x_NC if mask_NC is None else x_NC * mask_NC)
        if self.db_EOR is not None:
            assert reduced_NR is not None
            right_NR = reduced_NR.mul(self.scaling) if scale_N1 is None else reduced_NR * (scale_N1 * self.scaling)
            self.db_EOR[expert] = dy_NO.T @ right_NR.to(dy_NO.dtype)
        return d_reduced_NR

    def backward_input(
        self, dy_NO: Tensor, weight_OC: Tensor, d_reduced_NR: Tensor | None, expert: int, out_NC: Tensor
    ) -> None:
        """Write dX to `out_NC`."""
        torch.mm(dy_NO, weight_OC, out=out_NC)
        if self.a_ERC is None or d_reduced_NR is None:
            return
        mask_NC = self._mask(out_NC, expert)
        if mask_NC is None:
            out_NC.addmm_(d_reduced_NR, self.a_ERC[expert])
        else:
            out_NC.add_((d_reduced_NR @ self.a_ERC[expert]).mul_(mask_NC))

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of A and B in PEFT's layout and their own dtypes, None where not wanted."""
        da = db = None
        if self.a is not None and self.da_ERC is not None:
            da = self.da_ERC.view(self.a.shape).to(self.a.dtype)
        if self.b is not None and self.db_EOR is not None:
            db = self.db_EOR.permute(1, 2, 0).reshape(self.b.shape).to(self.b.dtype)
        return da, db
