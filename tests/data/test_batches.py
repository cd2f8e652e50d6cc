from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import fixture_path
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


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (7, 3), (40, 8), (100, 128)])
@pytest.mark.parametrize("weights", [(1.0,), (2.5, 0.3), (1.0, 0.0)])
def test_any_step_computed_alone_is_the_one_of_the_sequence(count: int, batch: int, weights: tuple[float, ...]) -> None:
    sequence = order(count, weights, batch, seed=5)
    steps = [sequence.step(n) for n in range(3 * sequence.steps_per_epoch + 1)]
    for n in np.random.default_rng(1).permutation(len(steps)):
        assert order(count, weights, batch, seed=5).step(int(n)) == steps[n], n
    for epoch in range(3):
        seen = steps[epoch * sequence.steps_per_epoch : (epoch + 1) * sequence.steps_per_epoch]
        assert all(len(step) == batch for step in seen[:-1])
        assert sum(len(step) for step in seen) == sequence.epoch_length
        assert 0 < len(seen[-1]) <= batch


def test_what_a_step_is_does_not_depend_on_how_many_steps_there_are() -> None:
    """Fewer epochs, a fraction of one and max_steps end the same order earlier."""
    steps = {length: order().steps(*length) for length in ((0.5, None), (2.4, None), (3, 5))}
    assert steps == {(0.5, None): 7, (2.4, None): 32, (3, 5): 5}
    assert order().steps(0.001, None) == 1


def test_two_million_examples_need_little_memory_and_time() -> None:
    count = 2_000_000
    large = Order(np.arange(count, dtype=np.int32) % 3, (1.0, 2.0, 0.5), 128, 0)
    tracemalloc.start()
    first = large.step(0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * large.epoch_length
    assert len(first) == 128
    started = time.process_time()
    for step in range(1, 500):
        large.step(step)
    # A fiftieth of this is usual; going through all examples in every step takes seconds.
    assert time.process_time() - started < 0.5


def tokens_of(shares: list[list[int]], lengths: np.ndarray) -> np.ndarray:
    return np.array([int(lengths[share].sum()) for share in shares])


LENGTHS = {
    "long and short": np.concatenate([np.full(40, 700), np.full(300, 20)]),
    "all equal": np.full(128, 200),
    "one very long": np.array([5000, *np.full(50, 30)]),
    "as people write": np.clip(np.random.default_rng(0).lognormal(5, 0.8, 500), 4, 2048).astype(np.int64),
    "one": np.array([9]),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("devices", range(1, 9))
def test_devices_hold_every_example_once_and_in_a_fixed_way(name: str, devices: int) -> None:
    lengths = LENGTHS[name]
    numbers = list(range(len(lengths)))
    shares = deal(numbers, lengths, devices)
    assert len(shares) == devices
    assert sorted(i for share in shares for i in share) == numbers
    assert deal(numbers[::-1], lengths, devices) == shares, "the order in which they are given plays a part"
    tokens = tokens_of(shares, lengths)
    assert tokens.max() <= max(lengths.max(), lengths.sum() / devices + lengths.max())
    assert deal([], lengths, devices) == [[]] * devices


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("row_tokens", [16, 100, 1000, 4096, 10**6])
def test_rows_hold_every_example_once_and_no_more_than_they_may(name: str, row_tokens: int) -> None:
    lengths = LENGTHS[name]
    numbers = list(range(len(lengths)))
    rows = pack(numbers, lengths, row_tokens)
    assert sorted(i for row in rows for i in row) == numbers
    for row in rows:
        assert sum(lengths[row]) <= row_tokens or len(row) == 1
        assert list(lengths[row]) == sorted(lengths[row], reverse=True)
    assert pack(numbers[::-1], lengths, row_tokens) == rows, "the order in which they are given plays a part"
    assert len(one_a_row(numbers, lengths)) == len(numbers)
    # No two rows would fit into one, but for the last: it takes what remains.
    filled = sorted(int(lengths[row].sum()) for row in rows[:-1])
    assert len(filled) < 2 or filled[0] + filled[1] > row_tokens


def test_an_example_that_a_step_holds_twice_stays_twice() -> None:
    lengths = np.array([30, 20, 20])
    chosen = [0, 1, 1, 2, 0]
    assert sorted(i for row in pack(chosen, lengths, 50) for i in row) == sorted(chosen)
    assert sorted(i for share in deal(chosen, lengths, 3) for i in share) == sorted(chosen)


def test_the_longest_with_those_two_that_fill_the_row_best() -> None:
    """50 and then the longest that fit, 30 and 9, would leave 11."""
    assert pack(range(5), np.array([50, 30, 28, 22, 9]), 100) == [[0, 2, 3], [1, 4]]
    assert pack(range(5), np.array([50, 25, 25, 22, 9]), 100) == [[0, 1, 2], [3, 4]]
    assert pack(range(3), np.array([60, 30, 20]), 100) == [[0, 1], [2]]


def test_a_device_gives_or_exchanges_an_example_where_that_evens_out() -> None:
    """Longest first alone makes 17 and 13, of 7 + 5 + 5 and 7 + 6."""
    lengths = np.array([7, 7, 6, 5, 5])
    assert sorted(tokens_of(deal(range(5), lengths, 2), lengths)) == [14, 16]


def test_a_large_step_is_packed_and_dealt_at_once() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 0.8, 10_000), 5, 2048).astype(np.int64)
    started = time.process_time()
    rows = pack(range(10_000), lengths, 4096)
    shares = deal(range(10_000), lengths, 8)
    # A twentieth of this is usual; what grows with the square takes more.
    assert time.process_time() - started < 1
    assert len(rows) == -(-lengths.sum() // 4096)
    assert tokens_of(shares, lengths).max() < lengths.sum() / 8 * 1.001


@pytest.fixture(scope="module")
def gsm8k(mistral_v1: Any) -> np.ndarray:
    """Tokens of each of GSM8K's training examples, in Alpaca's prompt, with Mistral's tokenizer."""
    rows = [json.loads(line) for line in fixture_path("data/gsm8k-train.jsonl").read_text().splitlines()]
    texts = [
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}"
        for row in rows
    ]
    # With the end token, which a text does not have.
    return np.array([len(encoding.ids) + 1 for encoding in mistral_v1.backend_tokenizer.encode_batch(texts)])


def steps_of(lengths: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    """The full steps of five epochs."""
    made = Order(np.zeros(len(lengths), np.int32), (1.0,), batch_size, 0)
    for step in range(5 * made.steps_per_epoch):
        if len(made.step(step)) == batch_size:
            yield made.step(step)


def test_the_busiest_of_eight_devices_has_hardly_more_than_the_mean(gsm8k: np.ndarray) -> None:
    busiest = []
    for chosen in steps_of(gsm8k, 128):
        tokens = tokens_of(deal(chosen, gsm8k, 8), gsm8k)
        busiest.append(tokens.max() / tokens.mean())
    assert len(busiest) == 290
    assert max(busiest) <= 1.02
    assert np.median(busiest) <= 1.001


@pytest.mark.parametrize(("batch_size", "devices"), [(128, 1), (512, 1), (1024, 8), (4096, 8)])
def test_rows_are_full_but_for_each_devices_last(gsm8k: np.ndarray, batch_size: int, devices: int) -> None:
    """A device's last row is what remains: 128 examples are 29 thousand tokens, 3.6 thousand for each of eight."""
    filled, rows, fewest = [], 0, 0
    for chosen in steps_of(gsm8k, batch_size):
        for share in deal(chosen, gsm8k, devices):
            packed = pack(share, gsm8k, 4096)
            filled += [gsm8k[row].sum() / 4096 for row in packed[:-1]]
            rows, fewest = rows + len(packed), fewest + int(-(-gsm8k[share].sum() // 4096))
    assert np.mean(filled) >= 0.995
    assert np.quantile(filled, 0.01) >= 0.97
    assert rows <= 1.01 * fewest, "about as few rows as the tokens can have"


def test_one_epoch_fills_its_rows(gsm8k: np.ndarray) -> None:
    rows = pack(range(len(gsm8k)), gsm8k, 4096)
    assert gsm8k.sum() / (4096 * len(rows)) >= 0.97
    assert len(rows) == -(-gsm8k.sum() // 4096)


def test_eight_devices_have_one_row_each_for_128_examples(gsm8k: np.ndarray) -> None:
    """So the row of a step is no fuller than the step: none of them is split into two for a few tokens."""
    for chosen in steps_of(gsm8k, 128):
        assert all(len(pack(share, gsm8k, 4096)) == 1 for share in deal(chosen, gsm8k, 8))


def test_more_devices_than_examples_leaves_some_without() -> None:
    assert sorted(len(share) for share in deal([0, 1], np.array([5, 6]), 4)) == [0, 0, 1, 1]
