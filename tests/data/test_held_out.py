"""Which examples are held out and which are equal, by their digests."""

from __future__ import annotations

import numpy as np

from tune.data.examples import Examples
from tune.data.held_out import hold_out, repeated, shared


def test_equal_examples_are_counted_by_all_of_their_digest():
    draw = np.random.default_rng(0)
    some, others = (draw.integers(0, 4, size=(size, 2)).astype(np.uint64) for size in (60, 7))
    as_tuples = [tuple(pair) for pair in some.tolist()]
    assert repeated(some) == 60 - len(set(as_tuples))
    for one, many in ((others, some), (some, others)):
        known = {tuple(pair) for pair in many.tolist()}
        assert shared(one, many) == sum(tuple(pair) in known for pair in one.tolist())
    assert repeated(some[:1]) == repeated(some[:0]) == 0


def test_held_out_numbers_are_even_and_each_seed_has_its_own():
    examples = Examples.of([[n, n + 1] for n in range(4000)], [[False, True]] * 4000)
    first, second = (set(hold_out(examples, 0.25, seed)[1].row.tolist()) for seed in (0, 1))
    for chosen in (first, second):
        assert abs(len(chosen) - 1000) < 110  # four standard deviations
    assert abs(len(first & second) - 250) < 65
    train, held = hold_out(examples, 0.25, 0)
    assert set(held.row.tolist()) == first
    assert sorted([*train.row.tolist(), *held.row.tolist()]) == list(range(4000))
    assert hold_out(examples.select(np.arange(100)), 0.25, 0)[1].row.tolist() == sorted(n for n in first if n < 100)
    assert set(hold_out(examples, 0.5, 0)[1].row.tolist()) > first
