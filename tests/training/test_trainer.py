from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import tiny_recipe, write_rows
from tests.training.processes import fork, wait
from tune.errors import RecipeError, UntrustworthyError
from tune.folder import RunFolder
from tune.recipe.load import load_recipe
from tune.run import train
from tune.training import step, trainer


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_logged_whatever_log_every_is(tmp_path: Path) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=5, train__log_every=100))
    entries = metrics(tmp_path / "run")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    wanted = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_bytes"}
    assert all(wanted <= entry.keys() for entry in entries)


def test_the_best_adapter_by_held_out_loss_is_the_result_and_the_last_stays(tmp_path: Path) -> None:
    """A learning rate that is far too high in the end: the best is not the last."""
    write_rows(tmp_path / "train.jsonl", 8)
    write_rows(tmp_path / "eval.jsonl", 8, start=100)
    changes = {
        "data__eval": [str(tmp_path / "eval.jsonl")],
        "train__eval_every": 2,
        "train__max_steps": 40,
        "train__scheduler": "constant",
        "train__keep": 1,
        "train__learning_rate": 0.05,
    }
    result = train(tiny_recipe(tmp_path, **changes))
    losses = {entry["step"]: entry["eval_loss"] for entry in metrics(tmp_path / "run") if "eval_loss" in entry}
    assert sorted(losses) == list(range(2, 41, 2))
    best = min(losses, key=losses.__getitem__)
    assert best < 40, "the case does not show what it should"
    assert result.adapter_step == best
    assert result.loss_after == losses[best]
    run = RunFolder(tmp_path / "run")
    assert run.steps() == [best, 40]
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (run.adapter / name).read_bytes() == (run.checkpoint(best) / name).read_bytes()

    last = train(tiny_recipe(tmp_path, output=tmp_path / "last", train__keep_best=False, **changes))
    assert last.adapter_step == 40
    assert last.loss_after == losses[40]

    patient = train(tiny_recipe(tmp_path, output=tmp_path / "patient", train__patience=1, **changes))
    worse, lowest, stop = 0, float("inf"), 0
    for number in sorted(losses):
        worse, lowest = (0, losses[number]) if losses[number] < lowest else (worse + 1, lowest)
        if worse == 1:
            stop = number
            break
    assert 0 < stop < 40
    assert patient.steps == stop
    assert patient.loss_after == lowest


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        ("constant", [0.005, 0.01, 0.01, 0.01, 0.01, 0.01]),
        ("linear", [0.005, 0.01, 0.008, 0.006, 0.004, 0.002]),
        ("cosine", [0.005, 0.01, 0.00904508, 0.00654508, 0.00345492, 0.00095492]),
    ],
)
def test_the_learning_rate_follows_the_schedule(tmp_path: Path, scheduler: str, rates: list[float]) -> None:
    train(tiny_recipe(tmp_path, train__max_steps=6, train__warmup=2, train__scheduler=scheduler))
    assert [entry["learning_rate"] for entry in metrics(tmp_path / "run")] == pytest.approx(rates, abs=1e-8)


def test_gradients_are_clipped_to_the_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    plain_step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(float(torch.nn.utils.get_total_norm(gradients)))
        return plain_step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    train(tiny_recipe(tmp_path, train__max_steps=3, train__max_grad_norm=0.01))
    assert seen == pytest.approx([0.01] * 3, rel=1e-3)
    assert all(entry["grad_norm"] > 0.02 for entry in metrics(tmp_path / "run")), "logged before clipping"


def test_a_step_without_finite_numbers_is_not_applied_and_three_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain_loss, calls = step.row_loss, 0

    def poisoned(model: Any, row: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return plain_loss(model, row) * (float("nan") if calls in poison else 1.0)

    monkeypatch.setattr(step, "row_loss", poisoned)
    changes = {"train__micro_batch_tokens": 100_000, "train__save_every": 1, "train__max_steps": 6, "train__keep": 9}
    poison = {3}
    train(tiny_recipe(tmp_path, **changes))
    run = RunFolder(tmp_path / "run")
    before, after = (load_file(run.checkpoint(n) / "adapter_model.safetensors") for n in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(run.root)[2]["loss"] is None
    final = load_file(run.adapter / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in final.values())
    assert any(not torch.equal(final[name], after[name]) for name in final)

    calls, poison = 0, {2, 3, 4}
    with pytest.raises(UntrustworthyError, match=r"step 4 .*train.jsonl:\d+.*learning_rate"):
        train(tiny_recipe(tmp_path, output=tmp_path / "diverged", **changes))
    diverged = RunFolder(tmp_path / "diverged")
    assert diverged.read_finished() is None
    assert not diverged.adapter.exists()
    for number in diverged.steps():
        saved = load_file(diverged.checkpoint(number) / "adapter_model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def test_dropout_changes_the_training_and_is_the_same_each_time(tmp_path: Path) -> None:
    def adapter(name: str, dropout: float) -> bytes:
        result = train(tiny_recipe(tmp_path, output=tmp_path / name, adapter__dropout=dropout, train__max_steps=3))
        return (result.adapter / "adapter_model.safetensors").read_bytes()

    assert adapter("a", 0.3) == adapter("b", 0.3) != adapter("c", 0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_combination_learns(tmp_path: Path, optimizer: str, quantization: str, dtype: str) -> None:
    result = train(
        tiny_recipe(
            tmp_path,
            train__optimizer=optimizer,
            model__quantization=quantization,
            model__dtype=dtype,
            train__max_steps=8,
            adapter__rank=64,
        )
    )
    assert result.loss_after < result.loss_before - 0.3
    weights = load_file(result.adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_recomputation_changes_nothing_but_memory(tmp_path: Path) -> None:
    kept = train(tiny_recipe(tmp_path, output=tmp_path / "kept", train__max_steps=3))
    again = train(tiny_recipe(tmp_path, output=tmp_path / "again", train__max_steps=3, train__recompute="full"))
    one, other = (load_file(run.adapter / "adapter_model.safetensors") for run in (kept, again))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_paged_moments_are_refused_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="adamw_8bit"):
        train(tiny_recipe(tmp_path, train__optimizer="paged_adamw_8bit"))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_wandb_runs_offline_and_hears_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    from accelerate.tracking import WandBTracker

    plain_log = WandBTracker.log

    def log(self: Any, values: dict[str, Any], step: int, **rest: Any) -> None:
        with open(tmp_path / "heard", "a") as file:
            file.write(json.dumps({**values, "step": step}) + "\n")
        plain_log(self, values, step, **rest)

    monkeypatch.setattr(WandBTracker, "log", log)
    recipe = tiny_recipe(tmp_path, train__max_steps=3, tracking__to=["wandb"], tracking__project="lamps")
    # In a process of its own: wandb leaves a service behind that later runs of the same process would use.
    assert wait(fork(lambda: train(recipe) and None, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    heard = [json.loads(line) for line in (tmp_path / "heard").read_text().splitlines()]
    assert [entry["step"] for entry in heard] == [1, 2, 3]
    assert all({"loss", "learning_rate", "tokens_per_second"} <= entry.keys() for entry in heard)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


def test_the_adapter_folder_is_a_stock_peft_folder_with_its_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    result = train(tiny_recipe(tmp_path, train__max_steps=1))
    names = {path.name for path in result.adapter.iterdir()}
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "README.md",
        "tokenizer.json",
    } <= names
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert "### Instruction:\nHi\n\n### Response:" in text


def test_models_that_leak_between_packed_examples_get_one_example_a_row(tmp_path: Path) -> None:
    lines: list[str] = []

    class Listener(trainer.Progress):
        def line(self, text: str) -> None:
            lines.append(text)

    result = train(tiny_recipe(tmp_path, "bloom", train__max_steps=4), progress=Listener())
    assert "attention sdpa, one example a row" in lines or "attention eager, one example a row" in lines
    assert result.loss_after < result.loss_before


def test_the_template_of_the_only_source_is_saved_answered_with_and_proven(tmp_path: Path) -> None:
    from tune.evaluation.generate import load_run
    from tune.export.merge import merge

    source = {"path": str(tmp_path / "train.jsonl"), "template": "vicuna"}
    finished = train(tiny_recipe(tmp_path, data__train=[source], train__max_steps=2))
    assert "ASSISTANT:" in (finished.adapter / "chat_template.jinja").read_text()
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.template == "vicuna"
    assert load_run(tmp_path / "run").template.name == "vicuna"
    assert merge(tmp_path / "run").proof.holds


def test_a_home_in_the_output_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(tiny_recipe(tmp_path, output="~/in-the-home", train__max_steps=1))
    assert (tmp_path / "in-the-home" / "adapter").is_dir()
    assert not (tmp_path / "~").exists()
