"""Killed at any moment and gone on with, a run ends in the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.training.endurance import kill_and_resume
from tests.training.jobs import tiny_recipe, write_rows
from tests.training.processes import fork, wait, wait_until
from tune.cli.main import _run
from tune.errors import ModelError, RunError
from tune.folder import RunFolder
from tune.progress import Progress
from tune.run import train

KILLS = int(os.environ.get("TUNE_SLOW_COUNT", "20"))


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, optimizer: str) -> None:
    kill_and_resume(
        tmp_path,
        kills=2,
        train__optimizer=optimizer,
        train__max_steps=16,
        train__save_every=2,
        adapter__dropout=0.1,
        adapter__rank=64,
    )


@pytest.mark.slow
def test_a_run_killed_many_times_ends_in_the_same_bytes(tmp_path: Path) -> None:
    eval_data = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 7}
    steps = max(120, 6 * KILLS)
    changes = {"train__max_steps": steps, "train__save_every": 1, "adapter__dropout": 0.1, **eval_data}
    kill_and_resume(tmp_path, KILLS, ("any", "write", "any", "start"), **changes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_a_checkpoint(tmp_path: Path, number: signal.Signals, code: int) -> None:
    recipe = tiny_recipe(tmp_path, output=tmp_path / "whole", train__max_steps=40, train__save_every=1000)
    train(recipe)
    run = RunFolder(tmp_path / "run")
    tiny_recipe(tmp_path, output=run.root, train__max_steps=40, train__save_every=1000)
    arguments = ["train", str(tmp_path / "recipe.yaml")]
    child = fork(lambda: _run(arguments), tmp_path / "log")
    wait_until(lambda: run.metrics.is_file() and len(steps_logged(run.root)) >= 2)
    os.kill(child, number)
    assert wait(child) == code
    log = (tmp_path / "log").read_text()
    assert f"stopped by {number.name} after step {run.steps()[-1]}" in log
    assert "--resume" in log
    assert "Traceback" not in log
    assert wait(fork(lambda: _run([*arguments, "--resume"]), tmp_path / "log")) == 0
    assert adapter(run.root) == adapter(tmp_path / "whole")


def test_a_longer_training_derives_its_schedule_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=4)
    train(recipe)
    longer = tiny_recipe(tmp_path, train__max_steps=8)
    result = train(longer, resume=True)
    assert result.steps == 8
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    reference = tiny_recipe(tmp_path, train__max_steps=8, output=tmp_path / "reference")
    train(reference)
    lines = (tmp_path / "reference/metrics.jsonl").read_text().splitlines()
    assert rates[4:] == [json.loads(line)["learning_rate"] for line in lines][4:]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=6, train__save_every=2)
    train(recipe)
    expected = adapter(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    run.finished.unlink()
    weights = run.checkpoint(6) / "optimizer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert train(recipe, resume=True).steps == 6
    assert adapter(tmp_path / "run") == expected


def test_an_existing_run_is_refused_and_the_flag_named(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=2)
    train(recipe)
    before = adapter(tmp_path / "run")
    with pytest.raises(RunError, match="--resume"):
        train(recipe)
    assert adapter(tmp_path / "run") == before
    assert train(recipe, resume=True).already


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train__learning_rate": 0.02}, r"train.learning_rate cannot change .*\(was 0.01, is 0.02\)"),
        ({"train__max_steps": 1}, r"train.max_steps may only grow .*\(was 2, is 1\)"),
        ({"adapter__rank": 8}, r"adapter.rank cannot change"),
    ],
)
def test_what_may_not_change_on_resume_is_refused_with_old_and_new(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=2))
    with pytest.raises(RunError, match=words):
        train(tiny_recipe(tmp_path, **{"train__max_steps": 2, **changes}), resume=True)


def test_changed_data_is_refused_on_resume(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=2))
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text().replace("things", "words"))
    with pytest.raises(RunError, match="data has changed"):
        train(tiny_recipe(tmp_path, train__max_steps=4), resume=True)


def test_cadences_may_change_on_resume(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=2))
    changed = tiny_recipe(tmp_path, train__max_steps=4, train__save_every=1, train__log_every=1, train__keep=1)
    assert train(changed, resume=True).steps == 4


def test_a_second_process_is_kept_out_while_the_first_trains(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=500)
    run = RunFolder(tmp_path / "run")
    child = fork(lambda: train(recipe) and None, tmp_path / "log")
    wait_until(run.metrics.is_file)
    with pytest.raises(RunError, match="another process"):
        train(recipe, resume=True)
    os.kill(child, signal.SIGKILL)
    wait(child)
    with run.lock():
        pass


def test_a_checkpoint_is_complete_and_is_a_peft_folder(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=3))
    folder = tmp_path / "run/checkpoints/step-000003"
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] == 3
    assert {"scheduler", "random", "threads", "versions", "machine", "optimizer"} <= state.keys()
    moments = load_file(folder / "optimizer.safetensors")
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(moments) == 3 * len(weights), "exp_avg, exp_avg_sq and step of each"
    assert not list(tmp_path.rglob("*.bin")) + list(tmp_path.rglob("*.pt")) + list(tmp_path.rglob("*.pkl"))


def test_only_the_newest_checkpoints_and_the_best_are_kept(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=9, train__save_every=1, train__keep=2)
    train(recipe)
    assert RunFolder(tmp_path / "run").steps() == [8, 9]


def test_a_changed_base_is_refused_on_resume(tmp_path: Path) -> None:
    from tests.tiny import write_model

    train(tiny_recipe(tmp_path, train__max_steps=2))
    write_model(tmp_path / "base", "mistral", seed=1)
    with pytest.raises(RunError, match="the base has changed"):
        train(tiny_recipe(tmp_path, train__max_steps=4), resume=True)


def test_a_damaged_checkpoint_does_not_crowd_out_the_new_ones(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=9, train__keep=1)
    train(recipe)
    run = RunFolder(tmp_path / "run")
    expected = adapter(run.root)
    run.finished.unlink()
    (run.checkpoint(9) / "adapter_model.safetensors").write_bytes(b"")
    kept: list[tuple[int, list[int]]] = []

    class Listener(Progress):
        def checkpoint(self, step: int) -> None:
            kept.append((step, run.steps()))

    train(recipe, resume=True, progress=Listener())
    assert kept == [(3, [3]), (6, [6]), (9, [9])]
    assert adapter(run.root) == expected


def test_a_training_may_not_become_shorter_by_another_key(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=20))
    with pytest.raises(RunError, match=r"may only grow .*they make 15 steps, were 20"):
        train(tiny_recipe(tmp_path, train__max_steps=None, train__epochs=3), resume=True)


def test_a_run_refused_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, output=tmp_path / "new" / "run", adapter__targets=["q_prj"])
    with pytest.raises(ModelError):
        train(recipe)
    assert not (tmp_path / "new").exists()


def test_a_damaged_best_checkpoint_is_not_handed_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", 8)
    write_rows(tmp_path / "eval.jsonl", 8, start=100)
    changes = {
        "data__eval": [str(tmp_path / "eval.jsonl")],
        "train__eval_every": 4,
        "train__max_steps": 40,
        "train__learning_rate": 0.05,
        "train__scheduler": "constant",
    }
    result = train(tiny_recipe(tmp_path, **changes))
    assert result.adapter_step < 40, "the case does not show what it should"
    run = RunFolder(tmp_path / "run")
    run.finished.unlink()
    (run.checkpoint(result.adapter_step) / "adapter_model.safetensors").write_bytes(b"")
    expected = adapter(run.root)
    with pytest.raises(RunError, match="Remove it and every later one"):
        train(tiny_recipe(tmp_path, **changes), resume=True)
    for step in run.steps():
        if step >= result.adapter_step:
            shutil.rmtree(run.checkpoint(step))
    assert train(tiny_recipe(tmp_path, **changes), resume=True).adapter_step == result.adapter_step
    assert adapter(run.root) == expected
