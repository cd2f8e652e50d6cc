"""A process that dies, wherever it was, ends the others within a minute; one that only stands still is waited for."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import FSDP, launch, logs, start
from tests.training.jobs import tiny_recipe
from tests.training.processes import wait, wait_until
from tune.data.cache import Cache
from tune.models import load
from tune.training import trainer

SLOW = pytest.mark.slow
DDP: dict[str, str] = {}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_CACHE", str(tmp_path / "cache"))


def reached(here: Path) -> None:
    """Tell the test that this process is where it is to be killed, or where others are to miss it, and go on slowly."""
    here.with_name(f"{here.name}.{os.environ['RANK']}").touch()
    time.sleep(1)


def while_loading(here: Path, patch: pytest.MonkeyPatch) -> None:
    plain = load.load_base

    def load_base(*arguments: Any, **names: Any) -> Any:
        reached(here)
        return plain(*arguments, **names)

    patch.setattr(load, "load_base", load_base)


def while_one_tokenises(here: Path, patch: pytest.MonkeyPatch) -> None:
    """The others wait for its lock. Only the first comes here in time: the rest are held back."""
    plain = Cache.fill

    def fill(self: Cache, key: str, work: Any, where: Any) -> Any:
        def slowly(writer: Any) -> Any:
            reached(here)
            return work(writer)

        if os.environ["RANK"] != "0":
            wait_until(here.with_name(f"{here.name}.0").exists)
        return plain(self, key, slowly, where)

    patch.setattr(Cache, "fill", fill)


def in_an_evaluation(here: Path, patch: pytest.MonkeyPatch) -> None:
    plain = trainer.row_loss

    def row_loss(model: Any, row: Any) -> Any:
        reached(here)
        return plain(model, row)

    patch.setattr(trainer, "row_loss", row_loss)


def while_the_first_saves(here: Path, patch: pytest.MonkeyPatch) -> None:
    """The others wait until it has."""
    plain = trainer.save_checkpoint

    def save_checkpoint(*arguments: Any) -> Any:
        reached(here)
        return plain(*arguments)

    patch.setattr(trainer, "save_checkpoint", save_checkpoint)


Place = Callable[[Path, pytest.MonkeyPatch], None]
DEATHS: list[tuple[Place, int, int, dict[str, str]]] = [
    # where, by whom it is reached, who is killed then
    (while_loading, 1, 1, FSDP),
    (while_loading, 0, 0, DDP),
    (while_one_tokenises, 0, 1, DDP),
    (while_one_tokenises, 0, 0, DDP),
    (in_an_evaluation, 1, 1, DDP),
    (in_an_evaluation, 0, 0, FSDP),
    (while_the_first_saves, 0, 1, FSDP),
    (while_the_first_saves, 0, 0, DDP),
]


@pytest.mark.parametrize(
    ("place", "reaches", "killed", "environment"),
    [pytest.param(*death, marks=() if number == 7 else SLOW) for number, death in enumerate(DEATHS)],
    ids=[f"{death[0].__name__}, {death[2]}{' of sharded' if death[3] else ''}" for death in DEATHS],
)
def test_a_killed_process_ends_the_others_wherever_it_was(
    place: Place,
    reaches: int,
    killed: int,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny_recipe(tmp_path, data__eval=[str(tmp_path / "eval.jsonl")], train__max_steps=6, train__save_every=2)
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--quiet"]
    with monkeypatch.context() as patch:
        place(tmp_path / "here", patch)
        children = start(arguments, 3, tmp_path / "log", environment)
    wait_until((tmp_path / f"here.{reaches}").exists)
    os.kill(children[killed], signal.SIGKILL)
    before = time.monotonic()
    codes = [wait(child, 60) for child in children]
    assert time.monotonic() - before < 60
    assert codes[killed] == -signal.SIGKILL
    assert [code for number, code in enumerate(codes) if number != killed] == [2, 2], logs(tmp_path / "log", 3)
    (line,) = [line for line in logs(tmp_path / "log", 3).splitlines() if line.strip()]
    assert line.startswith(f"{tmp_path / 'run'}: process {killed} of 3 is gone")
    assert launch([*arguments, "--resume"], 2, tmp_path / "again", environment) == [0, 0], logs(tmp_path / "again", 2)
    assert json.loads((tmp_path / "run" / "finished.json").read_text())["steps"] == 6


@pytest.mark.slow
def test_a_process_that_stands_still_ends_the_others_when_their_patience_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may go on at any time, so torch's own patience decides (half an hour over gloo); here it is three seconds."""
    import torch.distributed.distributed_c10d as groups

    monkeypatch.setattr(groups, "_get_default_timeout", lambda backend: timedelta(seconds=3))
    tiny_recipe(tmp_path, train__max_steps=60, train__save_every=1, train__keep=1)
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--quiet"]
    children = start(arguments, 2, tmp_path / "log", DDP)
    checkpoints = tmp_path / "run" / "checkpoints"
    wait_until(lambda: checkpoints.is_dir() and any(checkpoints.glob("step-*")))
    os.kill(children[1], signal.SIGSTOP)
    before = time.monotonic()
    assert wait(children[0], 60) == 2
    assert 2 < time.monotonic() - before < 30
    (line,) = [line for line in logs(tmp_path / "log", 2).splitlines() if line.strip()]
    assert "another process of 2 does not answer" in line
    assert "--resume" in line
    os.kill(children[1], signal.SIGCONT)
    assert wait(children[1], 60) == 2
    assert launch([*arguments, "--resume"], 2, tmp_path / "again") == [0, 0]
