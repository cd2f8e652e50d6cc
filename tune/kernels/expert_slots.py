"""Where each expert's rows lie when token slots are sorted by expert.

On a CPU, oneDNN compiles a kernel for every shape of a bf16 product and keeps it: 0.65 MB each, up to 16 products for
one number of rows, and the rows of an expert are another number in every step. There the number is rounded up to one
of few sizes. In float32 a CPU computes products of a few rows in another way, which rounds them differently: there an
expert gets no fewer rows than `least`, so that what a token becomes does not depend on how many others chose its
expert. Padding needs no room of its own: it reaches into the slots of the experts that follow, whose rows are
as good as any and which write theirs later; only behind the last slot is the table lengthened. What makes padding
harmless is that nobody reads its outputs and that its rows weigh nothing in the backward.

Shapes: S token slots in the order of experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[int, int, slice]
"""An expert, how many slots it has, and where they and their padding lie."""


def pads(x: Tensor) -> bool:
    """Whether products in x's dtype on x's device are better off with few sizes."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def least(x: Tensor) -> int:
    """How many rows a product in x's dtype on x's device needs, at least, to round each as it does among many.

    MKL's products of float32 need four rows with one thread and twelve with two.
    """
    return 32 if x.device.type == "cpu" and x.dtype == torch.float32 else 1


def rounded(count: int) -> int:
    """Round a number of rows up to one of few sizes: multiples of 32, from 512 on eight sizes to a power of two."""
    step = max(32, (1 << count.bit_length()) >> 4)
    return -(-count // step) * step


def parts(counts: Sequence[int], padded: bool, fewest: int = 1) -> list[Part]:
    """Return the experts that have slots, in order; each has at least `fewest` rows, or a rounded number."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, count, slice(start, start + (rounded(count) if padded else max(count, fewest)))))
        start += count
    return found


def lengthened(token_S: Tensor, experts: Sequence[Part]) -> Tensor:
    """Lengthen a table of slots by zeros as far as the padding of any expert reaches."""
    end = max((part.stop for _, _, part in experts), default=0)
    return torch.nn.functional.pad(token_S, (0, max(0, end - len(token_S))))


def inverse(order_S: Tensor) -> Tensor:
    """Return the permutation that undoes `order_S`."""
    inverse_S = torch.empty_like(order_S)
    inverse_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    return inverse_S
