"""Memory that runs out on one process while the base is split: all do the step again, and the adapter is the same."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import FSDP, finish, logged, logs, start_work
from tests.distributed.shortage import no_room, noting_rows, tokens
from tests.training.jobs import tiny_recipe, write_rows
from tests.training.test_out_of_memory import LONGEST, TIMES, adapter, state
from tune.cli.main import _run
from tune.training import step, trainer

SLOW = pytest.mark.slow
MIXTURE: dict[str, Any] = {"adapter__targets": ["attention", "experts"], "router__balance_loss": 1.0}


def run(
    arguments: list[str], folder: Path, name: str, count: int, fails: Callable[[], None] | None = None
) -> list[int]:
    """Run on processes that share the base, those to fail made to by `fails`."""

    def work(rank: int) -> int:
        noting_rows()
        if fails is not None:
            fails()
        return _run(arguments)

    return finish(start_work(work, count, folder / name, FSDP))


def on(*ranks: int) -> bool:
    return int(os.environ["RANK"]) in ranks


def too_long() -> bool:
    return tokens() > 300


def in_a_layer(*ranks: int) -> None:
    """In the forward of the second layer's attention."""
    plain = trainer.Trainer.__init__

    def init(self: trainer.Trainer, *args: Any) -> None:
        plain(self, *args)
        layer = self.network.model.layers[1]
        layer.self_attn.register_forward_pre_hook(lambda *_: no_room() if too_long() and on(*ranks) else None)

    trainer.Trainer.__init__ = init  # type: ignore[method-assign]


def in_the_loss(*ranks: int) -> None:
    """Behind the last layer, with embeddings and head gathered."""
    plain = step.head_loss

    def head_loss(*args: Any) -> Tensor:
        loss = plain(*args)
        return no_room() if too_long() and on(*ranks) else loss

    step.head_loss = head_loss


class Fails(torch.autograd.Function):
    """Fails in the backward."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(_: Any, *gradient: Tensor) -> Any:
        return no_room()


def in_the_backward(*ranks: int) -> None:
    """Behind the second layer; where activations are computed again, behind that."""
    plain = trainer.Trainer.__init__

    def init(self: trainer.Trainer, *args: Any) -> None:
        plain(self, *args)
        norm = self.network.model.layers[1].post_attention_layernorm
        norm.register_forward_hook(
            lambda _, __, output: Fails.apply(output) if too_long() and on(*ranks) and output.requires_grad else None
        )

    trainer.Trainer.__init__ = init  # type: ignore[method-assign]


def at_different_places() -> None:
    in_a_layer(1)
    in_the_backward(0)


def in_an_idle_row() -> None:
    """The first one, while the other's row goes on; and the other one's row fails later in the same."""
    plain, idle = trainer.Trainer.__init__, [True]

    def fails(*_: Any) -> None:
        if idle and tokens() == 2 and on(1):
            idle.clear()
            no_room()

    def init(self: trainer.Trainer, *args: Any) -> None:
        plain(self, *args)
        self.network.model.layers[0].mlp.register_forward_pre_hook(fails)

    trainer.Trainer.__init__ = init  # type: ignore[method-assign]
    in_the_loss(0)


def in_a_copy() -> None:
    """A gathered layer does not fit beside what was gathered: torch's own allocation, behind the gather."""
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

    plain, copies = FSDPParam.alloc_all_gather_outputs, [0]

    def alloc(self: Any) -> None:
        copies[0] = copies[0] + 1 if too_long() and on(1) else 0
        if copies[0] == 12:
            no_room()
        plain(self)

    FSDPParam.alloc_all_gather_outputs = alloc


PLACES: list[tuple[str, int, Callable[[], None], dict[str, Any]]] = [
    ("mixtral", 2, lambda: in_a_layer(1), {}),
    ("mistral", 2, lambda: in_a_layer(0, 1), {}),
    ("mistral", 2, lambda: in_the_loss(0), {}),
    ("mixtral", 2, lambda: in_the_backward(1), {}),
    ("mixtral", 2, lambda: in_the_backward(1), {"train__recompute": "full"}),
    ("mistral", 2, lambda: in_the_backward(0), {"train__recompute": "full", "model__dtype": "bfloat16"}),
    ("mistral", 2, at_different_places, {"train__recompute": "full"}),
    ("mixtral", 4, at_different_places, {}),
    ("mixtral", 2, in_an_idle_row, {}),
    ("mistral", 2, in_a_copy, {}),
]


@pytest.mark.parametrize(
    ("family", "count", "fails", "changes"),
    [pytest.param(*place, marks=() if number == 7 else SLOW) for number, place in enumerate(PLACES)],
    ids=[f"{number}-{place[0]}" for number, place in enumerate(PLACES)],
)
def test_a_step_is_done_again_in_shorter_rows(
    family: str, count: int, fails: Callable[[], None], changes: dict[str, Any], tmp_path: Path
) -> None:
    changes = {
        "train__max_steps": 4,
        "train__save_every": 2,
        "adapter__dropout": 0.2,
        "train__batch_size": 24,
        **changes,
    }
    changes |= MIXTURE if family == "mixtral" else {}
    tiny_recipe(tmp_path, family, train__micro_batch_tokens=500, **changes)
    arguments = ["train", str(tmp_path / "recipe.yaml")]
    assert run(arguments, tmp_path, "log", count, fails) == [0] * count, logs(tmp_path / "log", count)
    (warning,) = [text for text in logs(tmp_path / "log", count).splitlines() if "memory" in text and "ran out" in text]
    assert warning in (tmp_path / "log.0").read_text()
    shorter = state(tmp_path / "run", 4)["row_tokens"]
    assert LONGEST <= shorter <= 300
    tiny_recipe(tmp_path, family, output=tmp_path / "again", **{**changes, "train__micro_batch_tokens": shorter})
    assert run(arguments, tmp_path, "again-log", count) == [0] * count
    assert adapter(tmp_path / "run") == adapter(tmp_path / "again")
    ours, theirs = (
        [{key: value for key, value in entry.items() if key not in TIMES} for entry in logged(tmp_path / name)]
        for name in ("run", "again")
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("family", "count", "fails"),
    [
        ("mixtral", 2, lambda: in_a_layer(1)),
        pytest.param("mistral", 2, lambda: in_the_loss(0, 1), marks=SLOW),
        pytest.param("mistral", 2, in_a_copy, marks=SLOW),
        pytest.param("mixtral", 4, lambda: in_a_layer(2), marks=SLOW),
    ],
)
def test_an_evaluation_is_done_again_in_shorter_rows(
    family: str, count: int, fails: Callable[[], None], tmp_path: Path
) -> None:
    held_out = write_rows(tmp_path / "held-out.jsonl", 24, start=100)
    changes: dict[str, Any] = {
        "data__eval": [str(held_out)],
        "train__eval_every": 2,
        "train__max_steps": 4,
        "train__batch_size": 2,  # rows of a step are short, so that evaluations alone fail
        **(MIXTURE if family == "mixtral" else {}),
    }
    tiny_recipe(tmp_path, family, output=tmp_path / "plain", **changes)
    arguments = ["train", str(tmp_path / "recipe.yaml")]
    assert run(arguments, tmp_path, "plain-log", count) == [0] * count
    tiny_recipe(tmp_path, family, **changes)
    assert run(arguments, tmp_path, "log", count, fails) == [0] * count, logs(tmp_path / "log", count)
    assert logs(tmp_path / "log", count).count("memory ran out") == 1
    assert adapter(tmp_path / "run") == adapter(tmp_path / "plain")
    losses, expected = (
        [entry["eval_loss"] for entry in logged(tmp_path / name) if "eval_loss" in entry] for name in ("run", "plain")
    )
    assert len(losses) == 2
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "auto"])
def test_a_longest_example_that_does_not_fit_ends_all_with_one_message(recompute: str, tmp_path: Path) -> None:
    tiny_recipe(tmp_path, "mixtral", train__micro_batch_tokens=500, train__recompute=recompute, **MIXTURE)

    def fails() -> None:
        global too_long
        too_long = lambda: tokens() > 100  # noqa: E731
        in_a_layer(1)

    arguments = ["train", str(tmp_path / "recipe.yaml"), "--quiet"]
    assert run(arguments, tmp_path, "log", 2, fails) == [2, 2], logs(tmp_path / "log", 2)
    lines = [line for line in logs(tmp_path / "log", 2).splitlines() if line.strip() and "warning" not in line]
    assert len(lines) == 1, lines
    assert re.search(r"a row of \d+ tokens, and no row can be shorter", lines[0])
    assert re.search(r"about [\d.]+ kB for weights, [\d.]+ [kM]B for adapter and optimizer, [\d.]+ [kM]B for", lines[0])
    assert "lower adapter.rank" in lines[0]


def test_what_does_not_fit_outside_of_a_row_ends_all_with_one_message(tmp_path: Path) -> None:
    """The second process alone: the first is in the next step by then."""
    tiny_recipe(tmp_path)

    def fails() -> None:
        if on(1):
            torch.optim.AdamW.step = no_room  # type: ignore[method-assign]

    arguments = ["train", str(tmp_path / "recipe.yaml"), "--quiet"]
    assert run(arguments, tmp_path, "log", 2, fails) == [2, 2], logs(tmp_path / "log", 2)
    (line,) = [line for line in logs(tmp_path / "log", 2).splitlines() if line.strip()]
    assert "memory ran out outside of any row (CUDA out of memory)" in line


def test_a_gather_that_fails_itself_ends_all(tmp_path: Path) -> None:
    """Nobody knows then who took part in it, so nothing can be done together any more."""
    tiny_recipe(tmp_path)

    def fails() -> None:
        plain, calls = torch.distributed.all_gather_single, [0]

        def gather(*arguments: Any, **names: Any) -> Any:
            calls[0] += tokens() > 2
            return no_room() if calls[0] == 9 and on(1) else plain(*arguments, **names)

        torch.distributed.all_gather_single = gather

    arguments = ["train", str(tmp_path / "recipe.yaml"), "--quiet"]
    assert run(arguments, tmp_path, "log", 2, fails) == [2, 2], logs(tmp_path / "log", 2)
    (line,) = [line for line in logs(tmp_path / "log", 2).splitlines() if line.strip()]
    assert "memory ran out" in line


def test_a_real_allocator_fails_and_all_go_on(tmp_path: Path) -> None:
    """The second process's second layer asks PyTorch's allocator for more than any machine has.

    A limit of the address space would do more than that: gloo's own threads end the process where they get nothing.
    """
    tiny_recipe(tmp_path, train__micro_batch_tokens=500, train__max_steps=2)

    def fails() -> None:
        plain = trainer.Trainer.__init__

        def init(self: trainer.Trainer, *args: Any) -> None:
            plain(self, *args)
            self.network.model.layers[1].mlp.register_forward_pre_hook(
                lambda *_: torch.empty(2**55, dtype=torch.uint8) if too_long() and on(1) else None
            )

        trainer.Trainer.__init__ = init  # type: ignore[method-assign]

    assert run(["train", str(tmp_path / "recipe.yaml")], tmp_path, "log", 2, fails) == [0, 0], logs(tmp_path / "log", 2)
    assert "warning: memory ran out at a row of" in (tmp_path / "log.0").read_text()
    assert state(tmp_path / "run", 2)["shortened_from"] == 500
