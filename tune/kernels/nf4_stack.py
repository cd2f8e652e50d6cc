"""A stack of equal matrices [E, O, C], dense or packed in NF4 as one flat tensor, unpacked one matrix at a time.

bitsandbytes cuts a flattened tensor into blocks of 4-bit values (64) with a scale each, and under double
quantisation the scales into blocks of their own (256). Neither need end where a matrix ends. The whole blocks that
cover a matrix are unpacked and the surplus is cut off, so that a matrix equals its part of the whole tensor bit for
bit, whatever the sizes. Where blocks do end with the matrix, as in Mixtral, nothing is surplus and nothing is copied.

The packing is bitsandbytes' own (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

Shapes: E matrices, O output features (rows), C input features (columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stack:
    """The parts of a stack, in types that an operator's schema can carry."""

    tensors: list[Tensor]
    """[weight]; [packed, scales]; or, double-quantised, [packed, scales, their scales, their code, their offset]."""
    blocks: list[int]
    """Elements a block: none for a dense stack, else of the values and, double-quantised, of the scales."""
    dtype: torch.dtype
    """What the elements unpack to."""

    @classmethod
    def of(cls, weight: Tensor, state: QuantState | None) -> Stack:
        """Take apart a dense weight (`state` None), or a packed one: uint8, or the same bytes stored as bf16."""
        if state is None:
            return cls([weight], [], weight.dtype)
        assert state.quant_type == "nf4", state.quant_type
        if not state.nested:
            return cls([weight, state.absmax], [state.blocksize], state.dtype)
        inner = state.state2
        tensors = [weight, state.absmax, inner.absmax, inner.code, state.offset]
        return cls(tensors, [state.blocksize, inner.blocksize], state.dtype)

    def holds(self, count: int) -> bool:
        """Whether the stack has `count` elements; a packed one may end in half a byte or in a padded bf16."""
        weight = self.tensors[0]
        if not self.blocks:
            return weight.numel() == count
        return 0 <= weight.numel() * weight.element_size() - -(-count // 2) < weight.element_size()

    def elements(self, start: int, count: int) -> Tensor:
        """Return the flattened elements [start, start + count) of a packed stack in the stack's dtype."""
        packed = self.tensors[0].reshape(-1).view(torch.uint8)
        block = self.blocks[0]
        first, last = start // block, -(-(start + count) // block)
        taken = packed[first * block // 2 : last * block // 2]
        # Asked for as one row: on CPUs with AVX-512, bitsandbytes 0.50.2 gives rows that are no whole number of
        # blocks the scales of others.
        shape = torch.Size((1, 2 * len(taken)))
        scales = QuantState(
            absmax=self._scales(first, last), shape=shape, blocksize=block, quant_type="nf4", dtype=self.dtype
        )
        skipped = start - first * block
        return dequantize_4bit(taken.view(-1, 1), scales).view(-1)[skipped : skipped + count]  # type: ignore[no-any-return]

    def _scales(self, first: int, last: int) -> Tensor:
        """Return the float32 scales of the blocks [first, last)."""
        scales = self.tensors[1].reshape(-1)
        if len(self.blocks) == 1:
            return scales[first:last]
        block, (absmax, code, offset) = self.blocks[1], self.tensors[2:]
        lowest, highest = first // block, -(-last // block)
        state = QuantState(absmax=absmax[lowest:highest], code=code, blocksize=block, dtype=torch.float32)
        covered = dequantize_blockwise(scales[lowest * block : highest * block], state)
        return covered[first - lowest * block : last - lowest * block] + offset  # type: ignore[no-any-return]

    def matrix(self, number: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return one matrix [O, C] in `dtype`: a view of a dense stack in that dtype, else a new tensor."""
        if not self.blocks:
            return self.tensors[0][number].to(dtype)
        size = rows * columns
        return self.elements(number * size, size).to(dtype).view(rows, columns)
