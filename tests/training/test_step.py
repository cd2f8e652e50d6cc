"""What one step computes, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tune.data.load import load_data
from tune.data.tokenizer import load_tokenizer
from tune.evaluation.loss import rows_of
from tune.models.load import load_base
from tune.run import train
from tune.training import step, trainer

ONE_ROW = 100_000
"""Tokens that hold the whole of a tiny step."""


def test_recomputation_runs_every_layer_twice_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mistral.modeling_mistral import MistralMLP

    plain_mlp, plain_step = MistralMLP.forward, trainer.train_step
    calls = 0
    per_step: list[int] = []

    def mlp(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain_mlp(self, *args, **kwargs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = calls
        result = plain_step(*args, **kwargs)
        per_step.append(calls - before)
        return result

    monkeypatch.setattr(MistralMLP, "forward", mlp)
    monkeypatch.setattr(trainer, "train_step", counted)
    for recompute, times in (("none", 1), ("full", 2)):
        per_step.clear()
        changes = {"train__recompute": recompute, "train__micro_batch_tokens": ONE_ROW, "train__eval_every": 1}
        held_out = [str(tmp_path / "eval.jsonl")]
        train(tiny_recipe(tmp_path, output=tmp_path / recompute, train__max_steps=2, data__eval=held_out, **changes))
        assert per_step == [2 * times] * 2, f"two layers, recompute {recompute}"


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_weight_decay_shrinks_the_weights_as_adamw_does(tmp_path: Path, optimizer: str) -> None:
    """With B at zero A has no gradient, so the first step does to A nothing but decay it: A (1 - rate · decay)."""
    runs = {}
    for decay in (0.0, 0.5):
        changes = {"train__optimizer": optimizer, "train__weight_decay": decay, "train__learning_rate": 0.01}
        result = train(tiny_recipe(tmp_path, output=tmp_path / str(decay), train__max_steps=1, **changes))
        runs[decay] = load_file(result.adapter / "adapter_model.safetensors")
    for name, plain in runs[0.0].items():
        if "lora_A" in name:
            torch.testing.assert_close(runs[0.5][name], plain * (1 - 0.01 * 0.5), rtol=1e-6, atol=0)


def test_the_loss_of_a_model_with_a_bias_in_its_head_is_transformers_own(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "phi", intermediate_size=128)
    file = base / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.bias"] = torch.randn(384, generator=torch.Generator().manual_seed(0))
    save_file(tensors, file, metadata={"format": "pt"})
    recipe = tiny_recipe(tmp_path, base=base, model__quantization="none", adapter__targets=["q_proj", "v_proj"])
    data = load_data(recipe, load_tokenizer(recipe.model.base)).train
    model = load_base(recipe.model, torch.device("cpu")).model
    for number in range(3):
        (row,) = rows_of(data, [number], 1, False, torch.device("cpu"))
        ids, trained = (torch.tensor(part) for part in data.example(number))
        labels = torch.where(trained, ids.long(), -100)
        with torch.no_grad():
            reference = model(input_ids=ids.long()[None], labels=labels[None]).loss * trained.sum()
            assert float(step.row_loss(model, row)) == pytest.approx(float(reference), rel=1e-5)
