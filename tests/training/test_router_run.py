"""A run of a mixture of experts: what the balance does to it, what it carries from step to step, what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tests.training.test_state import ONE_ROW, logged, not_a_number, uninterrupted_and_resumed
from tune.cli.progress import ConsoleProgress
from tune.folder import RunFolder
from tune.run import train
from tune.training import metrics, step
from tune.training.devices import Devices
from tune.training.metrics import Metrics


def moe_recipe(folder: Path, **changes: Any) -> Any:
    """A recipe of a tiny Mixtral whose routers favour the first experts."""
    base = folder / "base"
    if not base.exists():
        write_model(base, "mixtral", num_local_experts=8)
        file = base / "model.safetensors"
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("gate.weight"):  # a longer row of it wins more often, and by more
                tensors[name] *= torch.linspace(4, 0.5, 8)[:, None]
        save_file(tensors, file, metadata={"format": "pt"})
    settings = {"model__quantization": "none", "adapter__targets": ["attention"], "router__balance_loss": 0.5}
    return tiny_recipe(folder, base=base, **{**settings, **changes})


def routed(run: Path) -> list[dict[str, Any]]:
    return [entry["router"] for entry in logged(RunFolder(run))]


def test_a_run_with_balance_ends_better_balanced_than_one_without(tmp_path: Path) -> None:
    """Left alone these routers crowd together as the loss falls; the default weight is enough to spread them."""
    ends = {}
    for weight in (0.0, 0.02):
        output = tmp_path / str(weight)
        train(moe_recipe(tmp_path, output=output, router__balance_loss=weight, train__max_steps=20))
        ends[weight] = routed(output)[-1]
    assert ends[0.0]["balance"] > 3.5, "the case does not show what it should"
    assert ends[0.02]["balance"] < ends[0.0]["balance"] - 0.8
    for layer in range(2):
        assert ends[0.02]["largest_load"][layer] < ends[0.0]["largest_load"][layer] - 0.3
        assert ends[0.02]["entropy"][layer] > ends[0.0]["entropy"][layer]


def test_a_resume_goes_on_with_the_load_of_the_step_before(tmp_path: Path) -> None:
    recipe = moe_recipe(tmp_path, train__max_steps=6, train__save_every=3)
    whole, resumed = uninterrupted_and_resumed(recipe, 3)
    assert resumed == whole
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())
    assert [len(layer) for layer in state["expert_counts"]] == [8, 8]
    tokens = logged(RunFolder(tmp_path / "run"))[-1]["tokens"]
    assert [sum(layer) for layer in state["expert_counts"]] == [2 * tokens] * 2


def test_a_step_that_was_not_applied_leaves_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = step.row_loss_and_router_logits, 0

    def poisoned(model: Any, row: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        nonlocal calls
        calls += 1
        loss, logits = plain(model, row)
        return (not_a_number(loss) if calls == 2 else loss), logits

    monkeypatch.setattr(step, "row_loss_and_router_logits", poisoned)
    train(moe_recipe(tmp_path, train__max_steps=3, train__save_every=1, train__micro_batch_tokens=ONE_ROW))
    saved = [
        json.loads((tmp_path / f"run/checkpoints/step-00000{number}/state.json").read_text())["expert_counts"]
        for number in (1, 2, 3)
    ]
    assert saved[0] == saved[1] != saved[2]
    entry = logged(RunFolder(tmp_path / "run"))[1]
    assert entry["loss"] is None
    assert len(entry["router"]["entropy"]) == 2


def test_the_losses_that_are_told_have_no_balance_in_them(tmp_path: Path) -> None:
    """With a learning rate of nothing: the same losses whatever the weight, but another gradient."""
    evaluated = {"data__eval": [str(tmp_path / "eval.jsonl")], "train__eval_every": 1}
    runs = {}
    for weight in (0.0, 50.0):
        output = tmp_path / str(weight)
        still = {"train__learning_rate": 1e-12, "train__max_steps": 2, "output": output}
        train(moe_recipe(tmp_path, router__balance_loss=weight, **still, **evaluated))
        runs[weight] = logged(RunFolder(output))
    for without, heavy in zip(runs[0.0], runs[50.0], strict=True):
        for key in ("loss", "eval_loss"):
            assert heavy[key] == pytest.approx(without[key], rel=1e-6)
        assert heavy["router"] == without["router"]
    first, second = (runs[50.0][n]["grad_norm"] / runs[0.0][n]["grad_norm"] for n in range(2))
    assert first == pytest.approx(1, rel=1e-6), "no load is known before the first step"
    assert second > 1.5


def test_a_dense_model_has_no_router(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=1, train__save_every=1))
    assert "router" not in logged(RunFolder(tmp_path / "run"))[0]
    state = json.loads((tmp_path / "run/checkpoints/step-000001/state.json").read_text())
    assert state["expert_counts"] is None


class Tracker:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.heard: dict[str, Any] = {}

    def log(self, values: dict[str, Any], step: int) -> None:
        self.heard |= values

    def finish(self) -> None:
        """Nothing was started."""


def test_trackers_hear_a_curve_for_every_layer_and_the_log_has_no_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker()
    monkeypatch.setattr(metrics, "_trackers", lambda run, recipe: [tracker])
    run = RunFolder(tmp_path)
    log = Metrics(run, tiny_recipe(tmp_path), Devices(), 0)
    router = {"balance": float("nan"), "entropy": [1.5, float("inf")], "dead_experts": [0, 3]}
    log.write({"step": 1, "loss": 2.0, "router": router})
    log.close()
    assert tracker.heard == {
        "loss": 2.0,
        "router/entropy/0": 1.5,
        "router/dead_experts/0": 0,
        "router/dead_experts/1": 3,
    }
    told = json.loads(run.metrics.read_text(), parse_constant=pytest.fail)
    assert told["router"] == {"balance": None, "entropy": [1.5, None], "dead_experts": [0, 3]}


def test_the_line_of_a_step_ends_in_the_balance(capsys: pytest.CaptureFixture[str]) -> None:
    entry = {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 100.0,
        "memory_bytes": 10**9,
    }
    console = ConsoleProgress()
    console.step(entry, 9, log=True)
    console.step({**entry, "router": {"balance": 2.0351}}, 9, log=True)
    dense, mixture = capsys.readouterr().out.splitlines()
    assert dense.endswith(" 1 GB")
    assert mixture == dense + "  balance 2.04"
