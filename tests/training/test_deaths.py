"""Signals at any moment, numbers that are not finite, and damage to every file of a checkpoint."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.endurance import stop_and_resume
from tests.training.jobs import tiny_recipe
from tests.training.processes import fork, wait, wait_until
from tests.training.test_state import Listener, outcome
from tune.cli.main import _run
from tune.errors import UntrustworthyError
from tune.folder import RunFolder
from tune.run import train
from tune.training import step, trainer
from tune.training.checkpoint import newest_whole

COUNT = int(os.environ.get("TUNE_SLOW_COUNT", "6"))
GRACE = 30.0
"""Seconds from SIGTERM to SIGKILL that SLURM and Kubernetes leave a job, unless told otherwise."""
AT_ONCE = 5.0
"""Seconds; far above what leaving takes, far below what the work that is left would have taken."""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
SLOW = pytest.mark.slow


def strict(text: str) -> Any:
    """Read JSON as its standard has it, without NaN or Infinity."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def stop(child: int, number: signal.Signals) -> tuple[int, float]:
    """Send a signal; return the exit code and the seconds until then."""
    sent = time.monotonic()
    os.kill(child, number)
    return wait(child, GRACE), time.monotonic() - sent


def patched(module: Any, name: str, by: Callable[..., Any], arguments: list[str]) -> Callable[[], int]:
    """The command line, in a child, with one function replaced."""

    def work() -> int:
        setattr(module, name, by)
        return _run(arguments)

    return work


def sleeper(marker: Path, seconds: float = 60) -> Callable[..., None]:
    def sleep(*args: Any, **kwargs: Any) -> None:
        marker.touch()
        time.sleep(seconds)

    return sleep


def places() -> dict[str, tuple[Any, str]]:
    """Where a run may be when it is stopped before its first step, and what to hold up there."""
    from tune.data import load as data_load
    from tune.models import load as models_load

    return {"reading data": (data_load, "load_data"), "loading": (models_load, "load_base")}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("reading data", signal.SIGINT),
        ("loading", signal.SIGTERM),
        pytest.param("reading data", signal.SIGTERM, marks=SLOW),
        pytest.param("loading", signal.SIGINT, marks=SLOW),
    ],
)
def test_a_signal_before_the_first_step_leaves_at_once(tmp_path: Path, place: str, number: signal.Signals) -> None:
    tiny_recipe(tmp_path)
    module, name = places()[place]
    arguments = ["train", str(tmp_path / "recipe.yaml")]
    child = fork(patched(module, name, sleeper(tmp_path / "there"), arguments), tmp_path / "log")
    wait_until((tmp_path / "there").exists)
    code, seconds = stop(child, number)
    assert code == CODES[number]
    assert seconds < AT_ONCE
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[-1] == (
        f"{tmp_path / 'run'}: stopped by {number.name} at once. Go on with the same command and --resume."
    )
    assert "Traceback" not in log
    assert not (tmp_path / "run").exists(), "no run had begun"


def test_a_library_that_swallows_a_signal_gets_another(tmp_path: Path) -> None:
    """As imports do: what a callback of the interpreter raises is printed and gone."""
    tiny_recipe(tmp_path)
    module, name = places()["loading"]

    def swallow(*args: Any, **kwargs: Any) -> None:
        class Dying:
            def __del__(self) -> None:
                sleeper(tmp_path / "there")()

        one = Dying()
        del one
        with contextlib.suppress(BaseException):
            sleeper(tmp_path / "there")()
        sleeper(tmp_path / "again")()

    child = fork(patched(module, name, swallow, ["train", str(tmp_path / "recipe.yaml")]), tmp_path / "log")
    wait_until((tmp_path / "there").exists)
    code, seconds = stop(child, signal.SIGTERM)
    assert code == 143
    assert seconds < AT_ONCE
    assert (tmp_path / "again").exists()
    (said,) = [line for line in (tmp_path / "log").read_text().splitlines() if not line.startswith("loading")]
    assert "stopped by SIGTERM at once" in said


def test_a_library_that_dallies_is_killed_by_the_second(tmp_path: Path) -> None:
    tiny_recipe(tmp_path)
    module, name = places()["loading"]

    def dally(*args: Any, **kwargs: Any) -> None:
        try:
            sleeper(tmp_path / "there")()
        finally:
            sleeper(tmp_path / "dallies")()

    child = fork(patched(module, name, dally, ["train", str(tmp_path / "recipe.yaml")]), tmp_path / "log")
    wait_until((tmp_path / "there").exists)
    os.kill(child, signal.SIGINT)
    wait_until((tmp_path / "dallies").exists)
    code, seconds = stop(child, signal.SIGINT)
    assert code == -signal.SIGINT
    assert seconds < AT_ONCE


@pytest.mark.parametrize("second", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_a_second_signal_within_a_step_leaves_at_once(tmp_path: Path, second: signal.Signals) -> None:
    """The first waits for a step that takes a minute; the second does not."""
    tiny_recipe(tmp_path, train__save_every=1)
    plain, steps = trainer.train_step, []

    def slow(*args: Any, **kwargs: Any) -> Any:
        if len(steps) == 2:
            sleeper(tmp_path / "there")()
        steps.append(1)
        return plain(*args, **kwargs)

    log = tmp_path / "log"
    child = fork(patched(trainer, "train_step", slow, ["train", str(tmp_path / "recipe.yaml")]), log)
    wait_until((tmp_path / "there").exists)
    os.kill(child, signal.SIGINT)
    wait_until(lambda: "SIGINT: saving a checkpoint after this step (again leaves at once)" in log.read_text())
    code, seconds = stop(child, second)
    assert code == CODES[second]
    assert seconds < AT_ONCE
    assert f"stopped by {second.name} at once. Go on" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert RunFolder(tmp_path / "run").steps() == [1, 2]
    assert wait(fork(lambda: _run(["train", str(tmp_path / "recipe.yaml"), "--resume"]), log)) == 0


HELD_OUT = {"train__eval_every": 2, "train__save_every": 3, "train__max_steps": 8, "train__patience": 3}


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_signal_within_an_evaluation_cuts_it_short(tmp_path: Path, number: signal.Signals) -> None:
    """The step before it is saved, and its evaluation comes with the resume: the run ends as if nothing had been."""
    changes = {**HELD_OUT, "data__eval": [str(tmp_path / "eval.jsonl")], "train__micro_batch_tokens": 64}
    whole = tiny_recipe(tmp_path, output=tmp_path / "whole", **changes)
    train(whole)
    tiny_recipe(tmp_path, **changes)
    run, log, plain = RunFolder(tmp_path / "run"), tmp_path / "log", trainer.row_loss

    def slow(model: Any, row: Any) -> Any:
        if run.metrics.is_file() and len(run.metrics.read_text().splitlines()) == 3:  # that of step 4
            sleeper(tmp_path / "there", 0.5)()
        return plain(model, row)

    child = fork(patched(trainer, "row_loss", slow, ["train", str(tmp_path / "recipe.yaml")]), log)
    wait_until((tmp_path / "there").exists)
    code, seconds = stop(child, number)
    assert code == CODES[number]
    assert seconds < 2, "six rows of half a second each"
    assert run.steps() == [2, 3, 4]
    assert f"stopped by {number.name} after step 4. Go on with the same command and --resume." in log.read_text()
    assert wait(fork(lambda: _run(["train", str(tmp_path / "recipe.yaml"), "--resume"]), log)) == 0
    resumed, uninterrupted = outcome(run), outcome(RunFolder(tmp_path / "whole"))
    resumed["steps"] = uninterrupted["steps"]  # that of step 4 is one more
    assert resumed == uninterrupted


def test_a_signal_within_the_evaluation_before_the_first_step(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, **HELD_OUT, data__eval=[str(tmp_path / "eval.jsonl")], train__micro_batch_tokens=64)
    plain, log = trainer.row_loss, tmp_path / "log"

    def slow(model: Any, row: Any) -> Any:
        sleeper(tmp_path / "there", 0.5)()
        return plain(model, row)

    child = fork(patched(trainer, "row_loss", slow, ["train", str(tmp_path / "recipe.yaml")]), log)
    wait_until((tmp_path / "there").exists)
    code, seconds = stop(child, signal.SIGTERM)
    assert code == 143
    assert seconds < 2
    said = "stopped by SIGTERM before the first checkpoint. Go on with the same command and --resume."
    assert said in log.read_text()
    assert wait(fork(lambda: _run(["train", str(tmp_path / "recipe.yaml"), "--resume"]), log)) == 0


@pytest.mark.slow
def test_a_process_of_its_own_is_gone_within_the_grace_period(tmp_path: Path) -> None:
    figures = stop_and_resume(tmp_path, 2 * COUNT)
    assert figures["stops"] == 2 * COUNT
    assert figures["longest_seconds"] < GRACE / 2


def not_finite(how: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def spoil(loss: torch.Tensor) -> torch.Tensor:
        if how == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss
        return loss + float(how)

    return spoil


@pytest.mark.parametrize("how", ["nan", pytest.param("inf", marks=SLOW), pytest.param("gradient", marks=SLOW)])
def test_a_diverged_run_leaves_nothing_poisoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, how: str
) -> None:
    """Steps 3 to 5 are bad: exit 3; moments, metrics and state of before are as a run without them has them."""
    changes = {"train__save_every": 1, "train__keep": 9, "train__micro_batch_tokens": 100_000}
    train(tiny_recipe(tmp_path, output=tmp_path / "sound", train__max_steps=10, **changes))
    tiny_recipe(tmp_path, train__max_steps=10, **changes)
    plain, calls = step.row_loss, 0

    def spoiled(model: Any, row: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = plain(model, row)
        return not_finite(how)(loss) if calls >= 3 else loss

    monkeypatch.setattr(step, "row_loss", spoiled)
    assert _run(["train", str(tmp_path / "recipe.yaml"), "--quiet"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in said[:3]] == [" step 3", " step 4", " step 5"]
    assert "3 steps in a row, the last of them step 5" in said[-1]
    assert "train.jsonl:" in said[-1]
    assert "Lower train.learning_rate" in said[-1]

    run, sound = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "sound")
    assert run.steps() == [1, 2, 3, 4]
    assert not run.adapter.exists()
    assert not run.finished.exists()
    for number in (2, 3, 4):
        for name in ("adapter_model.safetensors", "optimizer.safetensors"):
            ours, expected = run.checkpoint(number) / name, sound.checkpoint(2) / name
            assert ours.read_bytes() == expected.read_bytes(), "what step 2 left is what there is"
        saved = strict((run.checkpoint(number) / "state.json").read_text())
        assert saved["bad_steps"] == number - 2
        assert math.isfinite(saved["last_loss"])
    entries = [strict(line) for line in run.metrics.read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5], "the step that ended it is there as well"
    bad = entries[4]
    assert bad["grad_norm" if how == "gradient" else "loss"] is None
    assert len(bad["examples"]) == 8
    assert all("train.jsonl:" in where for where in bad["examples"])
    assert "examples" not in entries[1]


@pytest.mark.parametrize(
    ("where", "optimizer"),
    [
        ("parameter", "adamw"),
        ("moment", "adamw_8bit"),
        pytest.param("moment", "adamw", marks=SLOW),
        pytest.param("parameter", "adamw_8bit", marks=SLOW),
    ],
)
def test_a_step_that_spoils_the_adapter_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, optimizer: str
) -> None:
    plain, steps = trainer.train_step, 0

    def spoiling(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        result = plain(*args, **kwargs)
        steps += 1
        if steps == 3:
            parameter, state = args[3][0], args[4].state[args[3][0]]
            held = parameter if where == "parameter" else state["exp_avg" if optimizer == "adamw" else "absmax1"]
            with torch.no_grad():
                held.view(-1)[0] = float("inf")
        return result

    monkeypatch.setattr(trainer, "train_step", spoiling)
    changes = {"train__optimizer": optimizer, "adapter__rank": 64, "train__save_every": 1}
    with pytest.raises(UntrustworthyError, match=r"after step 3 the adapter or its moments .* not finite"):
        train(tiny_recipe(tmp_path, **changes))
    assert RunFolder(tmp_path / "run").steps() == [1, 2]


def test_a_base_without_a_finite_loss_is_no_json_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's own held-out loss is infinite, and the adapter mends that: every file can still be read."""
    losses = [float("inf"), 3.0, float("nan"), 2.0]
    monkeypatch.setattr(trainer, "held_out_loss", lambda *args, **kwargs: losses.pop(0))
    held_out = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 2, "train__keep": 9}
    recipe = tiny_recipe(tmp_path, train__max_steps=6, train__save_every=1, **held_out)
    result = train(recipe)
    assert result.loss_before == math.inf
    assert result.loss_after == 2.0
    run = RunFolder(tmp_path / "run")
    assert strict(run.finished.read_text())["loss_before"] is None
    assert strict((run.checkpoint(4) / "state.json").read_text())["last_loss"] is None
    entries = [strict(line) for line in run.metrics.read_text().splitlines()]
    assert [entry.get("eval_loss", 0) for entry in entries] == [0, 3.0, 0, None, 0, 2.0]
    again = train(recipe, resume=True)
    assert again.already
    assert math.isnan(again.loss_before)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "emptied": lambda content, chance: b"",
    "halved": lambda content, chance: content[: len(content) // 2],
    "cut by a byte": lambda content, chance: content[:-1],
    "longer by a byte": lambda content, chance: content + b"\0",
    "a flipped bit": lambda content, chance: flipped(content, chance),
    "zeroed": lambda content, chance: bytes(len(content)),
    "gone": lambda content, chance: None,
}
FILES = ("adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def flipped(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def damage(file: Path, how: str, chance: random.Random) -> None:
    content = DAMAGES[how](file.read_bytes(), chance)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of the steps 2, 4 and 6; only copies of it are damaged."""
    folder = tmp_path_factory.mktemp("saved")
    train(tiny_recipe(folder, train__max_steps=6, train__save_every=2))
    return folder


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_every_damage_to_every_file_is_found(saved: Path, tmp_path: Path, name: str, how: str) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(saved / "run" / "checkpoints", run.checkpoints)
    assert {file.name for file in run.checkpoint(6).iterdir()} == set(FILES)
    assert newest_whole(run) == (6, [])
    file = run.checkpoint(6) / name
    intact, chance = file.read_bytes(), random.Random(name + how)
    for _ in range(40 if how == "a flipped bit" else 1):
        damage(file, how, chance)
        if (name, how) == ("manifest.json", "cut by a byte"):  # the end of the line says nothing of the other files
            assert newest_whole(run) == (6, [])
        else:
            assert newest_whole(run) == (4, [6])
        file.write_bytes(intact)


@pytest.mark.parametrize("name", [name if name == "state.json" else pytest.param(name, marks=SLOW) for name in FILES])
def test_a_resume_names_the_damaged_checkpoint_and_uses_the_one_before(saved: Path, tmp_path: Path, name: str) -> None:
    """Two are damaged, each in its own way; the third is used, and the run ends in the same bytes."""
    for file in ("base", "train.jsonl", "eval.jsonl"):
        (tmp_path / file).symlink_to(saved / file)
    recipe = tiny_recipe(tmp_path, base=saved / "base", train__max_steps=6, train__save_every=2,
                         data__train=str(saved / "train.jsonl"))  # fmt: skip
    shutil.copytree(saved / "run", tmp_path / "run")
    run, chance = RunFolder(tmp_path / "run"), random.Random(name)
    run.finished.unlink()
    damage(run.checkpoint(6) / name, "a flipped bit", chance)
    damage(run.checkpoint(4) / name, "halved", chance)
    listener = Listener()
    train(recipe, resume=True, progress=listener)
    passed = [line for line in listener.said if "damaged" in line]
    for line, number in zip(passed, (6, 4), strict=True):
        assert line.startswith(f"{run.checkpoint(number)} is damaged (")
        assert line.endswith(") and is passed over")
        assert name in line or name == "manifest.json", "another file is then not as it says"
    assert "resume from step 2" in listener.said
    final = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert final == (saved / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_second_process_is_refused_with_one_line_and_changes_nothing(tmp_path: Path) -> None:
    tiny_recipe(tmp_path, train__max_steps=500, train__save_every=1000)
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--resume"]
    run = RunFolder(tmp_path / "run")
    first = fork(lambda: _run(arguments), tmp_path / "log")
    wait_until(lambda: run.metrics.is_file() and run.metrics.stat().st_size > 0)
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path != run.metrics}
    assert wait(fork(lambda: _run(arguments), tmp_path / "second")) == 2
    assert (tmp_path / "second").read_text().splitlines() == [
        f"{run.root}: another process is training here. Wait for it, or give this run another output."
    ]
    after = {path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path != run.metrics}
    assert after == before
    assert stop(first, signal.SIGTERM)[0] == 143
