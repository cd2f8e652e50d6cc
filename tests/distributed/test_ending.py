"""What goes wrong on one process ends all of them, soon, with one message and one exit code."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.distributed.ranks import FSDP, compare, launch, logs, start
from tests.training.jobs import tiny_recipe
from tests.training.processes import wait, wait_until
from tune.data import load as data_load
from tune.errors import DataError
from tune.run import train
from tune.training import trainer


def said(log: Path, count: int) -> list[str]:
    """All lines that the processes printed."""
    return [line for line in logs(log, count).splitlines() if line.strip()]


def test_different_recipes_are_refused_by_the_key_that_differs(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)

    def arguments(rank: int) -> list[str]:
        change = ["train.learning_rate=0.002", "train.seed=1"] if rank == 1 else []
        return ["train", str(tmp_path / "recipe.yaml"), *change]

    log = tmp_path / "log"
    assert launch(arguments, 3, log) == [2, 2, 2]
    ending = "Start every process with the same recipe and overrides."
    assert said(log, 3) == [
        f"accelerate launch: process 1 has train.learning_rate: 0.002, process 0 has 0.01. {ending}",
        f"accelerate launch: process 1 has train.seed: 1, process 0 has 0. {ending}",
    ]
    assert not (tmp_path / "run").exists()


def test_resume_on_one_process_only_is_refused(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    again = ["train", str(tmp_path / "recipe.yaml"), "--resume"]
    assert launch(lambda rank: again if rank else again[:-1], 2, tmp_path / "log") == [2, 2]
    assert "process 1 has --resume: true, process 0 has false" in logs(tmp_path / "log", 2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.base=./nowhere", "does not exist"),
        ("train.learning_rate=fast", "train.learning_rate"),
        ("train.optimizer=paged_adamw_8bit", "needs a CUDA device"),
        ("adapter.targets=[qq_proj]", "'qq_proj' names no linear layer"),
    ],
)
@pytest.mark.parametrize("environment", [{}, FSDP], ids=["whole", "sharded"])
def test_what_all_meet_is_said_once(override: str, words: str, environment: dict[str, str], tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml"), override, "--quiet"], 2, log, environment) == [2, 2]
    lines = said(log, 2)
    assert len(lines) == 1, lines
    assert words in lines[0]


@pytest.mark.parametrize("guilty", [0, 1])
def test_what_one_meets_is_said_by_that_one(guilty: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_recipe(tmp_path)
    plain = data_load.load_data

    def load_data(*arguments: object) -> object:
        if os.environ.get("RANK") == str(guilty):
            raise DataError("rows.jsonl: is not on this machine. Copy it.")
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(data_load, "load_data", load_data)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml"), "--quiet"], 3, log) == [2, 2, 2]
    assert said(log, 3) == ["rows.jsonl: is not on this machine. Copy it."]


def test_a_bug_on_one_process_shows_its_traceback_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_recipe(tmp_path)
    plain = trainer.train_step

    def train_step(*arguments: object) -> object:
        if os.environ.get("RANK") == "1":
            raise ZeroDivisionError("a bug")
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "train_step", train_step)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml"), "--quiet"], 2, log, FSDP) == [2, 1]
    assert log.with_suffix(".0").read_text().strip() == ""
    assert "ZeroDivisionError: a bug" in log.with_suffix(".1").read_text()


@pytest.mark.parametrize(
    ("killed", "environment"),
    [
        pytest.param(1, FSDP),
        pytest.param(0, FSDP, marks=pytest.mark.slow),
        pytest.param(1, {}, marks=pytest.mark.slow),
    ],
    ids=["sharded", "the first of sharded", "whole"],
)
def test_a_killed_process_ends_the_others(killed: int, environment: dict[str, str], tmp_path: Path) -> None:
    long = {"train__save_every": 1, "train__batch_size": 2, "train__max_steps": 300, "train__keep": 1}
    tiny_recipe(tmp_path, **long)
    log, run = tmp_path / "log", tmp_path / "run"
    command = ["train", str(tmp_path / "recipe.yaml")]
    children = start([*command, "--quiet"], 3, log, environment)
    wait_until(lambda: any((run / "checkpoints").glob("step-*")) if (run / "checkpoints").is_dir() else False)
    os.kill(children[killed], signal.SIGKILL)
    before = time.monotonic()
    codes = [wait(child, 60) for child in children]
    assert time.monotonic() - before < 30
    assert codes[killed] == -signal.SIGKILL
    assert [code for number, code in enumerate(codes) if number != killed] == [2, 2]
    assert said(log, 3) == [
        f"{run}: process {killed} of 3 is gone (killed, or out of memory?), so the others stop. The system's log may "
        "say why. Go on with the same command and --resume."
    ]


@pytest.mark.slow
def test_a_run_whose_process_was_killed_ends_in_the_same_adapter(tmp_path: Path) -> None:
    changes = {"train__save_every": 1, "train__max_steps": 12}
    train(tiny_recipe(tmp_path, output=tmp_path / "one", **changes))
    tiny_recipe(tmp_path, output=tmp_path / "two", **changes)
    command = ["train", str(tmp_path / "recipe.yaml"), "--quiet"]
    children = start(command, 2, tmp_path / "log", FSDP)
    wait_until(lambda: (tmp_path / "two/checkpoints").is_dir() and any((tmp_path / "two/checkpoints").glob("step-*3")))
    os.kill(children[1], signal.SIGKILL)
    assert [wait(child) for child in children] == [2, -signal.SIGKILL]
    assert not (tmp_path / "two/adapter").exists()
    assert launch([*command, "--resume"], 2, tmp_path / "again", FSDP) == [0, 0], logs(tmp_path / "again", 2)
    compare(tmp_path / "one", tmp_path / "two")


def test_deepspeed_is_answered_with_what_to_use(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    log = tmp_path / "log"
    asked = {"ACCELERATE_USE_DEEPSPEED": "true"}
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log, asked) == [2, 2]
    lines = said(log, 2)
    assert len(lines) == 1, lines
    assert "DeepSpeed" in lines[0]
    assert "--use_fsdp --fsdp_version 2" in lines[0]
