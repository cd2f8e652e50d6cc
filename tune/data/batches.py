"""Which examples are in step n, on which device, in which row: a pure function of the seed and the step's number.

Nothing is carried from step to step, so going on from step n needs only n. An epoch is a permutation seeded by
(seed, epoch); step n takes the next `batch_size` examples of its epoch, and the last, short batch of an epoch is a
step. `batch_size` counts examples over all devices: how they are dealt and packed changes the speed of a step,
never what it computes.

Within a step, examples are dealt to devices and packed into rows by length:

  * dealing: longest first, each to the device with the fewest tokens so far (the LPT rule of Graham 1969);
  * packing: longest first, each into the fullest row that still has room (best-fit decreasing). A row holds at most
    `micro_batch_tokens`; a longer example gets a row of its own.

Ties are broken by the example's number, so that the result depends on nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
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

    @property
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
    """Split the examples of a step over devices so that each has nearly as many tokens; some may have none."""
    shares: list[list[int]] = [[] for _ in range(devices)]
    load = [0] * devices
    for example in sorted(examples, key=lambda i: (-lengths[i], i)):
        device = load.index(min(load))
        shares[device].append(example)
        load[device] += int(lengths[example])
    return shares


def pack(examples: Sequence[int], lengths: NDArray[np.int64], row_tokens: int) -> list[Row]:
    """Pack examples into rows of at most `row_tokens` tokens, without padding."""
    rows: list[Row] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda i: (-lengths[i], i)):
        length = int(lengths[example])
        fits = [(room[i], i) for i in range(len(rows)) if room[i] >= length]
        if fits:
            i = min(fits)[1]
            rows[i].append(example)
            room[i] -= length
        else:
            rows.append([example])
            room.append(row_tokens - length)
    return rows


def one_a_row(examples: Sequence[int], lengths: NDArray[np.int64]) -> list[Row]:
    """One example a row, longest first, for models that cannot keep packed examples apart."""
    return [[example] for example in sorted(examples, key=lambda i: (-lengths[i], i))]
