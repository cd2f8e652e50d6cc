"""Which examples are in step n, on which device, in which row: a pure function of the seed and the step's number.

Nothing is carried from step to step, so going on from step n needs only n. An epoch is a permutation seeded by
(seed, epoch); step n takes the next `batch_size` examples of its epoch, and the last, short batch of an epoch is a
step. `batch_size` counts examples over all devices: how they are dealt and packed changes the speed of a step,
never what it computes.

Within a step, examples are dealt to devices and packed into rows by length:

  * dealing: longest first, each to the device with the fewest tokens so far (the LPT rule of Graham 1969), which
    may leave the busiest device some percent above the others; then that one gives an example to another, or
    exchanges one for a shorter, as long as this brings the two closer;
  * packing: one row after the other, each time with the longest example that still fits, and at its end with those
    two that fill it best. What remains goes into the last row. A row holds at most `micro_batch_tokens`; a longer
    example gets a row of its own.

Ties are broken by the example's number, so that the result depends on nothing else, not even on the order in which
the examples are given.
"""

from __future__ import annotations

import functools
import heapq
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Row = list[int]
"""Example numbers that share a row, in their order within it."""


@dataclass(frozen=True, eq=False)
class Order:
    """The order of the examples over a whole run."""

    source: NDArray[np.int32]
    """[n], the source that each example came from."""
    weights: tuple[float, ...]
    """How many times each source's rows appear in an epoch; a fraction is a seeded part of them."""
    batch_size: int
    seed: int

    @functools.cached_property
    def epoch_length(self) -> int:
        """Examples in an epoch, the same in each."""
        return sum(round(weight * int((self.source == i).sum())) for i, weight in enumerate(self.weights))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.epoch_length / self.batch_size)

    def steps(self, epochs: float, max_steps: int | None) -> int:
        """Optimizer steps of the whole run."""
        return max_steps if max_steps is not None else max(1, math.ceil(round(epochs * self.steps_per_epoch, 6)))

    @functools.lru_cache(maxsize=2)  # noqa: B019  a run has one order, and lives as long
    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """The example numbers of one epoch, in order."""
        random = np.random.default_rng([self.seed, epoch])
        chosen = []
        for i, weight in enumerate(self.weights):
            members = np.flatnonzero(self.source == i)
            count = round(weight * len(members))
            whole, part = divmod(count, len(members)) if len(members) else (0, 0)
            chosen += [members] * whole + [random.permutation(members)[:part]]
        return random.permutation(np.concatenate(chosen)) if chosen else np.empty(0, np.int64)

    def step(self, step: int) -> list[int]:
        """The examples of step `step` (from 0)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        start = place * self.batch_size
        return [int(i) for i in self.epoch(epoch)[start : start + self.batch_size]]


def deal(examples: Sequence[int], lengths: NDArray[np.int64], devices: int) -> list[list[int]]:
    """Split the examples of a step over devices so that each has nearly as many tokens; some may have none.

    Each share is in order of length, longest first.
    """
    shares: list[list[_Item]] = [[] for _ in range(devices)]
    least = [(0, device) for device in range(devices)]
    for item in _longest_first(examples, lengths):
        tokens, device = least[0]
        shares[device].append(item)
        heapq.heapreplace(least, (tokens - item[0], device))
    load = [tokens for _, tokens in sorted((device, tokens) for tokens, device in least)]
    for share in shares:
        share.sort()
    while max(load) > sum(load) / devices * (1 + _UNEVEN) and _ease_busiest(shares, load):
        pass
    return [[example for _, example in share] for share in shares]


_Item = tuple[int, int]
"""(-tokens, example's number): sorts longest first, then by number."""

_UNEVEN = 0.001
"""What the busiest device may have above the mean: less would not be noticed."""


def _longest_first(examples: Iterable[int], lengths: NDArray[np.int64]) -> list[_Item]:
    return sorted((-int(lengths[example]), int(example)) for example in examples)


def _ease_busiest(shares: list[list[_Item]], load: list[int]) -> bool:
    """Let the busiest device give an example, or exchange one for a shorter; False where that evens out nothing.

    The two differ less afterwards, in whole tokens, and nobody else changes: it ends.
    """
    busiest = load.index(max(load))
    mine = shares[busiest]
    for other in sorted(range(len(load)), key=lambda device: (load[device], device)):
        theirs, excess = shares[other], load[busiest] - load[other]
        # Moving d tokens leaves a difference of |excess - 2 d|.
        best: tuple[int, _Item, _Item | None] | None = None
        for given in mine:
            near = bisect_left(theirs, (given[0] + excess // 2, -1))
            returned: list[_Item | None] = [None, *theirs[max(near - 1, 0) : near + 1]]
            for back in returned:
                moved = (back[0] if back else 0) - given[0]
                left = abs(excess - 2 * moved)
                if left < excess and (best is None or left < best[0]):
                    best = left, given, back
        if best is not None:
            _, given, back = best
            for share, loses, gains in ((mine, given, back), (theirs, back, given)):
                if loses is not None:
                    share.remove(loses)
                if gains is not None:
                    insort(share, gains)
            moved = (back[0] if back else 0) - given[0]
            load[busiest] -= moved
            load[other] += moved
            return True
    return False


class _Unplaced:
    """The examples that are in no row yet, by length."""

    def __init__(self, examples: Iterable[int], lengths: NDArray[np.int64]) -> None:
        self._numbers: dict[int, list[int]] = {}
        for length, example in reversed(_longest_first(examples, lengths)):
            self._numbers.setdefault(-length, []).append(example)
        self.lengths = sorted(self._numbers)
        """Each length that occurs, once."""

    def longest(self, most: int) -> int:
        """The length of the longest example of at most `most` tokens; 0 when there is none."""
        place = bisect_right(self.lengths, most)
        return self.lengths[place - 1] if place else 0

    def take(self, length: int) -> _Item:
        """Remove the example of this length that has the lowest number."""
        numbers = self._numbers[length]
        example = numbers.pop()
        if not numbers:
            del self._numbers[length]
            del self.lengths[bisect_left(self.lengths, length)]
        return -length, example

    def fullest_pair(self, room: int) -> tuple[int, int]:
        """The lengths of two examples that together leave the least of `room`; (0, 0) when no two fit."""
        best, low, high = (0, 0), 0, bisect_right(self.lengths, room) - 1
        while low <= high:
            short, long = self.lengths[low], self.lengths[high]
            if short + long > room or (low == high and len(self._numbers[long]) < 2):
                high -= 1
                continue
            if short + long > sum(best):
                best = long, short
            if short + long == room:
                break
            low += 1
        return best


def pack(examples: Sequence[int], lengths: NDArray[np.int64], row_tokens: int) -> list[Row]:
    """Pack examples into rows of at most `row_tokens` tokens, without padding; the last row takes what remains.

    Each row is in order of length, longest first.
    """
    rows: list[Row] = []
    unplaced = _Unplaced(examples, lengths)
    while unplaced.lengths:
        row = [unplaced.take(unplaced.lengths[-1])]
        room = row_tokens + row[0][0]
        while room > 0 and (longest := unplaced.longest(room)):
            # Two that fill the row leave less than the longest and whatever fits beside it.
            ends = room <= 2 * unplaced.lengths[-1]
            chosen = unplaced.fullest_pair(room) if ends else (longest,)
            for length in chosen if sum(chosen) > longest else (longest,):
                row.append(unplaced.take(length))
                room -= length
        rows.append([example for _, example in sorted(row)])
    return rows


def one_a_row(examples: Sequence[int], lengths: NDArray[np.int64]) -> list[Row]:
    """One example a row, longest first, for models that cannot keep packed examples apart."""
    return [[example] for _, example in _longest_first(examples, lengths)]
