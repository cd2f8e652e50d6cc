"""Weights in which some rows of some matrices are others, or stand behind those that are there.

It is what an adapter with added tokens makes of its base's embedding and output head.

Shapes: K rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tune.models.shards import Stored
from tune.models.streamed import Weights


@dataclass(frozen=True, slots=True)
class RowValues:
    """Rows of a matrix in the place of its own, or behind them."""

    ids: tuple[int, ...]
    """Which, in any order, each once."""
    values_KH: Tensor
    """[K, H], float32, on the CPU."""

    def height(self, rows: int) -> int:
        """How many rows a matrix of `rows` has with these."""
        return max([rows, *(row + 1 for row in self.ids)])

    def delta(self, shape: tuple[int, ...]) -> RowValues | None:
        """Return itself; None when it belongs to a matrix of another width, or would leave rows without a value."""
        fits = len(shape) == 2 and shape[1] == self.values_KH.shape[1] and len(self.ids) == len(self.values_KH)
        behind = range(shape[0], self.height(shape[0])) if fits else ()
        return self if fits and len(behind) <= len(self.ids) and set(behind) <= set(self.ids) else None

    def rounded(self, dtype: torch.dtype) -> RowValues:
        """The same rows with the values that `dtype` has."""
        return RowValues(self.ids, self.values_KH.to(dtype).float())


class ReplacedRows(Weights):
    """Other weights, with rows of some matrices replaced or appended.

    Args:
        weights: the others.
        rows: by the stored name of the matrix.
    """

    def __init__(self, weights: Weights, rows: Mapping[str, RowValues]) -> None:
        super().__init__(weights.checkpoint)
        self.weights, self.replaced = weights, rows
        self._places = {name: {row: place for place, row in enumerate(some.ids)} for name, some in rows.items()}

    def count(self, name: str) -> int:
        count = self.weights.count(name)
        return self.replaced[name].height(count) if name in self.replaced else count

    def whole(self, stored: Stored) -> Tensor:
        if isinstance(stored, str) and stored in self.replaced:
            return self.tensor(stored)
        return self.weights.whole(stored)

    def tensor(self, name: str) -> Tensor:
        return self.rows(name, 0, self.count(name)) if name in self.replaced else self.weights.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.replaced:
            return self.weights.rows(name, start, stop)
        values_KH, places = self.replaced[name].values_KH, self._places[name]
        found = torch.empty(stop - start, values_KH.shape[1])
        there = min(stop, self.weights.count(name))
        if start < there:
            found[: there - start] = self.weights.rows(name, start, there)
        for row in places.keys() & set(range(start, stop)) if len(places) > stop - start else places:
            if start <= row < stop:
                found[row - start] = values_KH[places[row]]
        return found
