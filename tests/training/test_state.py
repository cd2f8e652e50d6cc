"""What a run carries from step to step and over a resume; a resume must end where no interruption would have."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import tiny_recipe, write_rows
from tests.training.processes import fork, wait
from tune.errors import ModelError, UntrustworthyError
from tune.folder import RunFolder
from tune.recipe.schema import Recipe
from tune.run import train
from tune.training import step, trainer

TIMINGS = ("tokens_per_second", "peak_memory_bytes", "memory_bytes", "trained_seconds")
BESIDE = (*TIMINGS, "output", "scheduler")
"""What may differ: the scheduler's own notes are made from the step's number, and its rates are in the metrics."""
ONE_ROW = 100_000
"""Tokens that hold the whole of a tiny step, so that a call of the loss is a step."""


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def comparable(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in BESIDE}


def logged(run: RunFolder) -> list[dict[str, Any]]:
    return [comparable(json.loads(line)) for line in run.metrics.read_text().splitlines()]


def outcome(run: RunFolder) -> dict[str, Any]:
    """All that a run ends in, but for its timings."""
    finished = run.read_finished()
    assert finished is not None
    newest = run.checkpoint(run.steps()[-1])
    return {
        "adapter": weights(run.adapter),
        "finished": comparable(finished),
        "state": comparable(json.loads((newest / "state.json").read_text())),
        "moments": (newest / "optimizer.safetensors").read_bytes(),
        "metrics": logged(run),
        "steps": run.steps(),
    }


def cut_back(run: RunFolder, number: int) -> None:
    """Leave of a finished run what a kill after the checkpoint of step `number` would have left."""
    run.finished.unlink()
    shutil.rmtree(run.adapter)
    for later in run.steps():
        if later > number:
            shutil.rmtree(run.checkpoint(later))
    assert run.steps()[-1] == number


def uninterrupted_and_resumed(recipe: Recipe, number: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train, go back to step `number`, resume; return both outcomes."""
    assert recipe.output is not None
    run = RunFolder(Path(recipe.output))
    train(recipe)
    whole = outcome(run)
    cut_back(run, number)
    train(recipe, resume=True)
    return whole, outcome(run)


class Listener(trainer.Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def line(self, text: str) -> None:
        self.said.append(text)

    warn = line


def poison(monkeypatch: pytest.MonkeyPatch, calls: Iterable[int], how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Let `how` spoil the loss of these steps, counted from 1; later calls of `poison` count anew."""
    plain, chosen, count = step.row_loss, set(calls), 0

    def spoiled(model: Any, row: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        loss = plain(model, row)
        return how(loss) if count in chosen else loss

    monkeypatch.setattr(step, "row_loss", spoiled)


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The same finite loss, whose gradient is not finite."""
    loss.register_hook(lambda gradient: gradient * float("inf"))
    return loss


def not_a_number(loss: torch.Tensor) -> torch.Tensor:
    """A loss that is not finite, with the same finite gradient."""
    return loss + float("nan")


def test_dropout_masks_are_the_same_after_a_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=6, train__save_every=3, adapter__dropout=0.3)
    whole, resumed = uninterrupted_and_resumed(recipe, 3)
    assert resumed == whole


def test_dropout_masks_differ_from_step_to_step(tmp_path: Path) -> None:
    """One example again and again, with a learning rate of nothing: only the mask can change the gradient."""
    write_rows(tmp_path / "train.jsonl", 1)
    changes = {"train__batch_size": 1, "train__max_steps": 4, "train__learning_rate": 1e-12}
    norms = {}
    for dropout in (0.0, 0.3):
        run = RunFolder(tmp_path / str(dropout))
        train(tiny_recipe(tmp_path, output=run.root, adapter__dropout=dropout, **changes))
        norms[dropout] = [entry["grad_norm"] for entry in logged(run)]
    assert norms[0.0] == pytest.approx([norms[0.0][0]] * 4, rel=1e-6)
    assert len({round(norm / norms[0.3][0], 3) for norm in norms[0.3]}) == 4, norms


def test_an_evaluation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    changes = {"train__max_steps": 6, "adapter__dropout": 0.3}
    plain = train(tiny_recipe(tmp_path, output=tmp_path / "plain", **changes))
    evaluated = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 2, "train__keep_best": False}
    watched = train(tiny_recipe(tmp_path, output=tmp_path / "watched", **changes, **evaluated))
    assert watched.measured_on == "held-out data"
    assert weights(watched.adapter) == weights(plain.adapter)


def script_evaluations(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> list[float]:
    """Let these be the held-out losses, in order; what is left of the list is still to come."""
    left = list(losses)
    monkeypatch.setattr(trainer, "held_out_loss", lambda *args, **kwargs: left.pop(0))
    return left


def test_the_best_step_and_the_patience_outlive_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best comes before the interruption, the third evaluation without a better one after it."""
    losses = [5.0, 4.0, 3.0, 3.5, 3.4, 3.3, 3.2, 3.1]
    recipe = tiny_recipe(
        tmp_path,
        data__eval=[str(tmp_path / "eval.jsonl")],
        train__max_steps=7,
        train__eval_every=1,
        train__save_every=1,
        train__keep=2,
        train__patience=3,
    )
    run = RunFolder(tmp_path / "run")
    script_evaluations(monkeypatch, losses)
    result = train(recipe)
    assert (result.steps, result.adapter_step, result.loss_before, result.loss_after) == (5, 2, 5.0, 3.0)
    whole = outcome(run)
    cut_back(run, 4)
    script_evaluations(monkeypatch, losses[5:])
    train(recipe, resume=True)
    assert outcome(run) == whole
    assert run.steps() == [2, 4, 5]


def test_evaluation_before_the_first_step_is_not_repeated_on_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 3}
    recipe = tiny_recipe(tmp_path, train__max_steps=6, train__save_every=3, **held_out)
    first = train(recipe)
    cut_back(RunFolder(tmp_path / "run"), 3)
    left = script_evaluations(monkeypatch, [1.25, 1.125])
    resumed = train(recipe, resume=True)
    assert left == [1.125], "one evaluation, of step 6"
    assert resumed.loss_before == first.loss_before
    assert resumed.loss_after == 1.25


@pytest.mark.parametrize(("how", "key"), [(infinite_gradient, "grad_norm"), (not_a_number, "loss")])
def test_a_step_is_applied_only_if_loss_and_gradient_are_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: Callable[[torch.Tensor], torch.Tensor], key: str
) -> None:
    poison(monkeypatch, [2], how)
    recipe = tiny_recipe(tmp_path, train__max_steps=3, train__save_every=1, train__micro_batch_tokens=ONE_ROW)
    train(recipe)
    run = RunFolder(tmp_path / "run")
    saved = [load_file(run.checkpoint(number) / "adapter_model.safetensors") for number in (1, 2, 3)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    assert any(not torch.equal(saved[1][name], saved[2][name]) for name in saved[0])
    assert all(tensor.isfinite().all() for tensor in saved[2].values())
    assert [name for name in ("loss", "grad_norm") if logged(run)[1][name] is None] == [key]


def test_bad_steps_before_a_resume_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=9, train__save_every=1, train__micro_batch_tokens=ONE_ROW)
    with monkeypatch.context() as patch:
        poison(patch, [3, 4, 5], not_a_number)
        with pytest.raises(UntrustworthyError, match="step 5 "):
            train(recipe)
    assert RunFolder(tmp_path / "run").steps()[-1] == 4
    poison(monkeypatch, [1], not_a_number)
    with pytest.raises(UntrustworthyError, match="step 5 "):
        train(recipe, resume=True)


@pytest.mark.parametrize("keep_best", [True, False])
def test_a_run_killed_after_its_last_checkpoint_only_finishes(tmp_path: Path, keep_best: bool) -> None:
    held_out = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 2}
    recipe = tiny_recipe(tmp_path, train__max_steps=4, train__keep_best=keep_best, **held_out)
    whole, resumed = uninterrupted_and_resumed(recipe, 4)
    assert resumed == whole


def test_a_run_made_longer_is_unfinished_until_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=2))
    run = RunFolder(tmp_path / "run")
    assert run.finished.exists()
    longer = tiny_recipe(tmp_path, train__max_steps=4)

    def cut(self: trainer.Trainer) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", cut)
        with pytest.raises(KeyboardInterrupt):
            train(longer, resume=True)
    assert not run.finished.exists()
    result = train(longer, resume=True)
    assert (result.steps, result.already) == (4, False)


def test_one_changed_bit_in_the_newest_adapter_sends_the_resume_to_the_checkpoint_before(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=9, train__save_every=3)
    run = RunFolder(tmp_path / "run")
    train(recipe)
    whole = outcome(run)
    cut_back(run, 6)
    file = run.checkpoint(6) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 0x40  # a high bit of the last weight's mantissa: it can be read as well as before
    file.write_bytes(content)
    listener = Listener()
    train(recipe, resume=True, progress=listener)
    why = "adapter_model.safetensors is not as it was written"
    assert f"{run.checkpoint(6)} is damaged ({why}) and is passed over" in listener.said
    assert "resume from step 3" in listener.said
    assert outcome(run) == whole


def test_what_a_killed_process_left_half_written_is_swept_away(tmp_path: Path) -> None:
    """The kill comes when the second checkpoint is written and not yet renamed."""
    recipe = tiny_recipe(tmp_path, output=tmp_path / "whole", train__max_steps=6)
    train(recipe)
    recipe = tiny_recipe(tmp_path, train__max_steps=6)
    run = RunFolder(tmp_path / "run")

    def killed() -> None:
        plain = os.replace

        def replace(source: Any, target: Any) -> None:
            if Path(target) == run.checkpoint(6):
                os.kill(os.getpid(), signal.SIGKILL)
            plain(source, target)

        os.replace = replace  # type: ignore[assignment]
        train(recipe)

    assert wait(fork(killed, tmp_path / "log")) == -signal.SIGKILL, (tmp_path / "log").read_text()
    left = list(run.checkpoints.glob(".unfinished-*"))
    assert len(left) == 1
    assert (left[0] / "manifest.json").is_file()
    (run.root / ".unfinished-metrics").touch()
    with run.lock():
        assert not list(run.root.rglob(".unfinished-*"))
    train(recipe, resume=True)
    whole = outcome(RunFolder(tmp_path / "whole"))
    assert outcome(run) == whole


def test_a_resume_goes_on_from_the_checkpoint_and_not_from_start_from(tmp_path: Path) -> None:
    first = train(tiny_recipe(tmp_path, output=tmp_path / "first", train__max_steps=2))
    recipe = tiny_recipe(tmp_path, adapter__start_from=str(first.adapter), train__max_steps=6, train__save_every=3)
    whole, resumed = uninterrupted_and_resumed(recipe, 3)
    assert resumed == whole


def test_a_resume_without_a_whole_checkpoint_begins_again_at_start_from(tmp_path: Path) -> None:
    first = train(tiny_recipe(tmp_path, output=tmp_path / "first", train__max_steps=2))
    recipe = tiny_recipe(tmp_path, adapter__start_from=str(first.adapter), train__max_steps=3)
    train(recipe)
    run = RunFolder(tmp_path / "run")
    whole = outcome(run)
    cut_back(run, 3)
    (run.checkpoint(3) / "manifest.json").unlink()
    train(recipe, resume=True)
    assert outcome(run) == whole


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 8}, "adapter.alpha: 32"),
        ({"rank": 8}, "adapter.rank: 4"),
        ({"rslora": True}, "adapter.rslora: false"),
    ],
)
def test_an_adapter_of_another_rank_or_scale_is_not_continued(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    first = train(tiny_recipe(tmp_path, output=tmp_path / "first", train__max_steps=1))
    different = {f"adapter__{key}": value for key, value in changes.items()}
    with pytest.raises(ModelError, match=f"Set {words} to continue"):
        train(tiny_recipe(tmp_path, adapter__start_from=str(first.adapter), **different))
