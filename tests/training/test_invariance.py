"""A step computes the same whatever its rows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.jobs import tiny_recipe
from tune.adapters.lora import adapter_parameters, attach
from tune.data.load import load_data
from tune.data.tokenizer import load_tokenizer
from tune.evaluation.loss import held_out_loss, rows_of
from tune.models.load import load_base, recompute_activations
from tune.run import train
from tune.training.step import row_loss


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def gradients(recipe: Any, row_tokens: int, packed: bool, recompute: bool = False) -> dict[str, torch.Tensor]:
    tokenizer = load_tokenizer(recipe.model.base)
    data = load_data(recipe, tokenizer)
    base = load_base(recipe.model, torch.device("cpu"))
    model = attach(base, recipe.adapter, "tiny", seed=0)
    for name, parameter in adapter_parameters(model):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if recompute:
        recompute_activations(base.model)
    base.model.train()
    chosen = list(range(16))
    trained = int(data.train.trained_counts[chosen].sum())
    for row in rows_of(data.train, chosen, row_tokens, packed, torch.device("cpu")):
        (row_loss(base.model, row) / trained).backward()
    return {name: parameter.grad for name, parameter in adapter_parameters(model)}


@pytest.mark.parametrize("changes", [{}, {"window": 16}], ids=["full attention", "window of 16"])
def test_gradients_of_a_step_do_not_depend_on_rows_packing_or_recomputation(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    from tests.tiny import write_model

    base = write_model(tmp_path / "base", "mistral", sliding_window=changes.get("window"))
    recipe = tiny_recipe(tmp_path, base=base)
    reference = gradients(recipe, 10**6, packed=False)
    assert all(gradient.norm() > 0 for gradient in reference.values())
    for row_tokens, packed, recompute in (
        (64, True, False),
        (512, True, False),
        (10**6, True, False),
        (512, True, True),
    ):
        ours = gradients(recipe, row_tokens, packed, recompute)
        for name, gradient in reference.items():
            assert relative(ours[name], gradient) < 1e-5, (name, row_tokens, packed, recompute)


def test_the_adapter_after_ten_steps_does_not_depend_on_rows_or_packing(tmp_path: Path) -> None:
    adapters = []
    for number, row_tokens in enumerate((64, 100_000)):
        recipe = tiny_recipe(tmp_path, output=tmp_path / f"run{number}", train__micro_batch_tokens=row_tokens)
        adapters.append(load_file(train(recipe).adapter / "adapter_model.safetensors"))
    for name, tensor in adapters[0].items():
        assert relative(tensor, adapters[1][name]) < 1e-4, name


def test_held_out_loss_does_not_depend_on_rows_and_equals_transformers(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    data = load_data(recipe, load_tokenizer(recipe.model.base))
    model = load_base(recipe.model, torch.device("cpu")).model
    losses = [
        held_out_loss(model, data.train, row_loss, row_tokens, packed, torch.device("cpu"))
        for row_tokens, packed in ((64, True), (10**6, True), (64, False))
    ]
    total = count = 0.0
    for number in range(len(data.train)):
        ids, trained = (torch.tensor(part) for part in data.train.example(number))
        labels = torch.where(trained, ids.long(), -100)
        with torch.no_grad():
            loss = model(input_ids=ids.long()[None], labels=labels[None]).loss
        total += float(loss) * int(trained.sum())
        count += int(trained.sum())
    for loss in losses:
        assert loss == pytest.approx(total / count, rel=1e-5)
