"""A row of a split base may be broken off anywhere: the process follows the others to the row's end, and holds nothing.

Where between two gathers a row fails makes no difference to the others: what they wait for is the same.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from tests.distributed.ranks import logs, together
from tests.distributed.shortage import no_room, noting_rows, tokens
from tests.tiny import write_model
from tests.training.processes import wait_until
from tune.data.collate import Row
from tune.models import sharding
from tune.models.sharding import Gathers, is_sharded, local_bytes
from tune.training import out_of_memory, step
from tune.training.devices import Devices
from tune.training.out_of_memory import DidNotFitError

SLOW = pytest.mark.slow
PLACES = int(os.environ.get("TUNE_SLOW_COUNT", "7"))
"""How many gathers of a row to fail at."""
SLACK = 10_000
"""Bytes of rows, counts and the like; what autograd keeps of a row here, and any unit of the base, are far more."""


def network(path: Path, family: str, recompute: str) -> tuple[Any, list[Tensor]]:
    """A sharded base with an adapter, as a run has it."""
    from tune.adapters.lora import adapter_parameters, attach
    from tune.models.load import load_base
    from tune.recipe.schema import Adapter, Model
    from tune.training.recompute import recompute as put_into_effect

    base = load_base(Model(base=str(path), dtype="float32"), torch.device("cpu"), sharding.STORAGE, sharded=True)
    targets = ["attention", "experts"] if family == "mixtral" else ["attention", "mlp"]
    adapted = attach(base, Adapter(rank=4, targets=targets), str(path), 0)
    put_into_effect(adapted, recompute)  # type: ignore[arg-type]
    torch.manual_seed(1)
    parameters = [parameter for _, parameter in adapter_parameters(adapted)]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, 0.02)
    model = adapted.get_base_model()
    model.train()
    return model, parameters


def a_row(tokens: int, seed: int) -> Row:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 300, (1, tokens), generator=generator)
    predict = torch.arange(tokens - 1)
    return Row(ids, torch.arange(tokens)[None], predict, ids[0, 1:].clone())


def live_bytes() -> int:
    """Bytes of all storages that anything in this process holds.

    What is alive is set aside after that: a failure collects garbage, and need not look through all libraries for it.
    """
    gc.unfreeze()
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, torch.nn.Parameter)
    }
    gc.freeze()
    return sum(storages.values())


class Sharded:
    """As much of `Devices` as a step needs."""

    sharded = True
    device = torch.device("cpu")
    count = 2

    together, idle_row, agree = Devices.together, Devices.idle_row, Devices.agree
    sum, sum_gradients = Devices.sum, Devices.sum_gradients


def one_step(model: Any, parameters: list[Tensor], rows: list[Row]) -> float:
    """A step that changes nothing: the norm of its gradient."""
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    return step.train_step(model, rows, 100, parameters, optimizer, 0.0, Sharded()).grad_norm  # type: ignore[arg-type]


@contextmanager
def failing_at(gather: int, issued: bool) -> Iterator[list[int]]:
    """Let a row fail just before its gather of this number, or just behind it; once, and not in an idle row."""
    failed: list[int] = []
    plain = Gathers.allocate, Gathers.__call__

    def fails(self: Gathers, number: int) -> bool:
        return not failed and tokens() > 2 and number == gather and self._left_out == 0

    def allocate(self: Gathers, *args: Any, **names: Any) -> Tensor:
        if not issued and fails(self, self.done):
            failed.append(self.done)
            no_room()
        return plain[0](self, *args, **names)

    def call(self: Gathers, *args: Any, **names: Any) -> Any:
        work = plain[1](self, *args, **names)
        if issued and fails(self, self.done - 1):
            failed.append(self.done)
            no_room()
        return work

    Gathers.allocate, Gathers.__call__ = allocate, call  # type: ignore[method-assign]
    try:
        yield failed
    finally:
        Gathers.allocate, Gathers.__call__ = plain  # type: ignore[method-assign]


def holding_little(most: list[int]) -> list[int]:
    """For a forked process: wherever it has let go of a row, and is about to follow the others, hold it to `most`.

    Returns a list that grows by one each time. Nothing is done while `most` is empty.
    """
    plain, done = out_of_memory.break_off, []

    def break_off(model: Any) -> None:
        plain(model)
        if most:
            settle(most[0])
            done.append(most[0])

    out_of_memory.break_off = break_off
    return done


def settle(most: int) -> None:
    """Return when no more than so many bytes are live; gloo's threads let go of a gather a little after it."""
    wait_until(lambda: live_bytes() <= most, 10)


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=SLOW)], ids=["", "torch without reset_iter_state"])
@pytest.mark.parametrize(
    ("family", "recompute", "places"),
    [
        ("mistral", "none", 2),
        pytest.param("mistral", "none", PLACES, marks=SLOW),
        pytest.param("mixtral", "none", PLACES, marks=SLOW),
        pytest.param("mixtral", "full", PLACES, marks=SLOW),
        pytest.param("mistral", "full", PLACES, marks=SLOW),
    ],
)
def test_a_row_may_fail_at_any_gather(family: str, recompute: str, places: int, by_hand: bool, tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", family, num_hidden_layers=3)

    def work(rank: int) -> None:
        if by_hand:
            del FSDPModule.reset_iter_state
        noting_rows()
        most: list[int] = []
        held_to_it = holding_little(most)
        model, parameters = network(path, family, recompute)
        rows = [a_row(80 + 5 * rank + n, 10 * rank + n) for n in range(2 + rank)]
        gathers: Gathers = model.gathers_of_a_row
        expected = one_step(model, parameters, rows)
        count = gathers.done
        assert count == 1 + 3 + 3, "embeddings and head, then each layer forwards and backwards"
        before, local = live_bytes(), local_bytes(model)
        gradients = sum(parameter.nbytes for parameter in parameters)
        numbers = range(0, count, -(-count // places))
        for number in numbers:
            for others in ({1: number}, {0: number}, {0: number, 1: count - 1 - number}, {0: number, 1: number}):
                for issued in (False, True):
                    most[:] = [before + gradients + SLACK] if others == {1: number} and issued else []
                    with failing_at(others.get(rank, -1), issued) as failed, pytest.raises(DidNotFitError) as caught:
                        one_step(model, parameters, rows)
                    assert len(failed) == (rank in others), (number, others, issued)
                    assert caught.value.tokens >= 80
                    assert local_bytes(model) == local
                    assert all(map(is_sharded, (model.model.embed_tokens.weight, model.lm_head.weight)))
                    caught.value.__traceback__ = None
            settle(before + SLACK)
            assert one_step(model, parameters, rows) == expected
        assert len(held_to_it) == (len(numbers) if rank == 1 else 0)

    assert together(work, 2, tmp_path / "log") == [0, 0], logs(tmp_path / "log", 2)
