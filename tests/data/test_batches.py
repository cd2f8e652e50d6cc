from __future__ import annotations

import numpy as np
import pytest

from tune.data.batches import Order, deal, one_a_row, pack


def order(count: int = 100, weights: tuple[float, ...] = (1.0,), batch: int = 8, seed: int = 0) -> Order:
    return Order(np.arange(count, dtype=np.int32) % len(weights), weights, batch, seed)


def test_an_epoch_sees_every_example_once_and_its_last_batch_is_short() -> None:
    steps = [order().step(n) for n in range(13)]
    assert sorted(i for step in steps for i in step) == list(range(100))
    assert [len(step) for step in steps] == [8] * 12 + [4]


def test_a_step_is_a_function_of_seed_and_number_alone() -> None:
    one, other = order(), order()
    assert [one.step(n) for n in (30, 2, 17)] == [other.step(n) for n in (30, 2, 17)]
    assert order(seed=1).step(0) != one.step(0)
    assert one.step(0) != one.step(13), "epochs are in different orders"


def test_weights_multiply_a_sources_rows() -> None:
    weighted = order(100, (2.0, 0.5))
    seen = np.bincount(weighted.epoch(0), minlength=100)
    assert set(seen[0::2]) == {2}
    assert set(seen[1::2]) == {0, 1}
    assert seen[1::2].sum() == 25
    assert weighted.epoch_length == 125
    other = np.bincount(weighted.epoch(1), minlength=100)
    assert (seen[1::2] != other[1::2]).any(), "each epoch draws its own half"


@pytest.mark.parametrize(("epochs", "max_steps", "steps"), [(1, None, 13), (3, None, 39), (0.5, None, 7), (3, 5, 5)])
def test_the_length_of_a_run(epochs: float, max_steps: int | None, steps: int) -> None:
    assert order().steps(epochs, max_steps) == steps


@pytest.mark.parametrize("row_tokens", [16, 100, 1000])
def test_rows_hold_every_example_once_and_no_more_than_they_may(row_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 200)
    rows = pack(range(200), lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == list(range(200))
    for row in rows:
        assert sum(lengths[row]) <= row_tokens or len(row) == 1
    assert len(one_a_row(range(200), lengths)) == 200


def test_long_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(50, 400, 500)
    rows = pack(range(500), lengths, 4096)
    assert lengths.sum() / (4096 * len(rows)) > 0.97


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_devices_share_a_step_evenly(devices: int) -> None:
    lengths = np.random.default_rng(0).integers(50, 400, 128)
    shares = deal(range(128), lengths, devices)
    assert sorted(i for share in shares for i in share) == list(range(128))
    tokens = [lengths[share].sum() for share in shares]
    assert max(tokens) / np.mean(tokens) < 1.02


def test_more_devices_than_examples_leaves_some_without() -> None:
    assert sorted(len(share) for share in deal([0, 1], np.array([5, 6]), 4)) == [0, 0, 1, 1]
