"""Two processes on one machine, over gloo: the same recipe gives the same adapter as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import compare, free_port, launch, logged
from tests.training.jobs import tiny_recipe, write_rows
from tune.run import train
from tune.training import trainer


def test_two_processes_train_the_adapter_of_one(tmp_path: Path) -> None:
    evaluated = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 5}
    train(tiny_recipe(tmp_path, output=tmp_path / "one", **evaluated))
    tiny_recipe(tmp_path, output=tmp_path / "two", **evaluated)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log) == [0, 0], log.with_suffix(".0").read_text()
    first, second = (log.with_suffix(f".{n}").read_text() for n in range(2))
    assert "devices 2 ddp" in first
    assert "\nlocal 2 x " in first, "each holds the whole base"
    assert second.strip() == "", "only the first process prints"
    compare(tmp_path / "one", tmp_path / "two")


def test_a_process_without_an_example_takes_part(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, output=tmp_path / "one", train__batch_size=1, train__max_steps=4))
    tiny_recipe(tmp_path, output=tmp_path / "two", train__batch_size=1, train__max_steps=4)
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, tmp_path / "log") == [0, 0]
    compare(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("batch_size", [1, 8], ids=["a process without an example", "examples for both"])
def test_two_processes_balance_routers_by_the_load_of_both(tmp_path: Path, batch_size: int) -> None:
    """Without the other's load, or with each its own, adapters would part: the balance outweighs the loss here."""
    changes = {
        "model__quantization": "none",
        "adapter__targets": ["attention"],
        "router__balance_loss": 1.0,
        "train__batch_size": batch_size,
        "train__max_steps": 5,
        "train__save_every": 1,
    }
    train(tiny_recipe(tmp_path, "mixtral", output=tmp_path / "one", **changes))
    tiny_recipe(tmp_path, "mixtral", output=tmp_path / "two", **changes)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log) == [0, 0], log.with_suffix(".0").read_text()
    compare(tmp_path / "one", tmp_path / "two")
    for one, two in zip(logged(tmp_path / "one"), logged(tmp_path / "two"), strict=True):
        assert two["router"]["balance"] == pytest.approx(one["router"]["balance"], rel=1e-4)
        assert two["router"]["largest_load"] == pytest.approx(one["router"]["largest_load"], rel=0.01)
    states = (tmp_path / name / "checkpoints/step-000003/state.json" for name in ("one", "two"))
    one, two = (json.loads(state.read_text())["expert_counts"] for state in states)
    assert [sum(layer) for layer in two] == [sum(layer) for layer in one]


def test_processes_share_the_evaluation_and_the_first_alone_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_loss, plain_replace = trainer.row_loss, os.replace

    def note(kind: str, what: Any) -> None:
        with open(tmp_path / f"{kind}.{os.environ.get('RANK', 'alone')}", "a") as file:
            file.write(f"{what}\n")

    def row_loss(model: Any, row: Any) -> torch.Tensor:
        note("evaluated", len(row.labels_N))
        return plain_loss(model, row)

    def replace(source: Any, target: Any) -> None:
        note("written", target)
        plain_replace(source, target)

    monkeypatch.setattr(trainer, "row_loss", row_loss)
    monkeypatch.setattr(os, "replace", replace)
    changes = {"train__max_steps": 4, "train__save_every": 2, "train__eval_every": 2}
    changes["data__eval"] = [str(tmp_path / "eval.jsonl")]
    train(tiny_recipe(tmp_path, output=tmp_path / "one", **changes))
    tiny_recipe(tmp_path, output=tmp_path / "two", **changes)
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log) == [0, 0], log.with_suffix(".0").read_text()

    one, two = (
        {entry["step"]: entry["eval_loss"] for entry in logged(tmp_path / name) if "eval_loss" in entry}
        for name in ("one", "two")
    )
    assert list(one) == [2, 4]
    assert two == pytest.approx(one, rel=1e-5)
    tokens = {
        rank: sum(int(line) for line in (tmp_path / f"evaluated.{rank}").read_text().splitlines())
        for rank in ("alone", "0", "1")
    }
    assert tokens["0"] + tokens["1"] == tokens["alone"]
    assert min(tokens.values()) > 0
    assert "step-000004" in (tmp_path / "written.0").read_text()
    assert not (tmp_path / "written.1").exists(), (tmp_path / "written.1").read_text()


def test_each_process_draws_dropout_masks_of_its_own(tmp_path: Path) -> None:
    """Twice the same example, one for each process: with one mask for both, the step were that of a single one."""
    write_rows(tmp_path / "train.jsonl", 1)
    single = (tmp_path / "train.jsonl").read_text()
    changes = {"train__max_steps": 1, "adapter__dropout": 0.3}
    train(tiny_recipe(tmp_path, output=tmp_path / "one", train__batch_size=1, **changes))
    (tmp_path / "train.jsonl").write_text(single * 2)
    tiny_recipe(tmp_path, output=tmp_path / "two", train__batch_size=2, **changes)
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, tmp_path / "log") == [0, 0]
    (one,), (two,) = (logged(tmp_path / name) for name in ("one", "two"))
    assert two["tokens"] == 2 * one["tokens"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["grad_norm"] != pytest.approx(one["grad_norm"], rel=1e-3)


def test_what_the_first_process_refuses_ends_all(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=1))
    log = tmp_path / "log"
    assert launch(["train", str(tmp_path / "recipe.yaml")], 2, log) == [2, 2]
    assert "--resume" in log.with_suffix(".0").read_text()


@pytest.mark.slow
def test_the_launch_line_of_the_readme_starts_two(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, output=tmp_path / "one"))
    tiny_recipe(tmp_path, output=tmp_path / "two")
    line = (
        f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        f"--mixed_precision no --dynamo_backend no --main_process_port {free_port()} -m tune train"
    )
    done = subprocess.run(
        [*line.split(), str(tmp_path / "recipe.yaml")],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "devices 2 ddp" in done.stdout
    compare(tmp_path / "one", tmp_path / "two")
