"""A step computes the same whatever its rows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tune.adapters.lora import adapter_parameters, attach
from tune.data.load import load_data
from tune.data.tokenizer import load_tokenizer
from tune.evaluation.loss import held_out_loss, rows_of
from tune.models.load import load_base, recompute_activations
from tune.run import train
from tune.training.devices import Devices
from tune.training.router_balance import RouterLoad, StepBalance, routers_of
from tune.training.step import row_loss, train_step


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


class Kept(torch.optim.SGD):
    """Keeps the gradients of the step and changes nothing."""

    seen: list[torch.Tensor]

    def step(self, closure: Any = None) -> None:
        self.seen = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]


def mixture_step(
    recipe: Any, row_tokens: int, packed: bool, recompute: bool = False, weight: float = 1.0
) -> tuple[dict[str, torch.Tensor], RouterLoad]:
    """The gradients and the load of a whole step of a mixture of experts, whose step before was out of balance."""
    data = load_data(recipe, load_tokenizer(recipe.model.base)).train
    base = load_base(recipe.model, torch.device("cpu"))
    model = attach(base, recipe.adapter, "tiny", seed=0)
    named = list(adapter_parameters(model))
    for name, parameter in named:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    if recompute:
        recompute_activations(base.model)
    base.model.train()
    chosen = list(range(16))
    parameters = [parameter for _, parameter in named]
    optimizer = Kept(parameters, lr=1.0)
    routers = routers_of(base.model)
    assert routers is not None
    previous = [[800, 600, 400, 200, 100, 60, 30, 10], [10, 30, 60, 100, 200, 400, 600, 800]]
    balance = StepBalance(routers, weight, int(data.lengths[chosen].sum()), previous, torch.device("cpu"))
    rows = rows_of(data, chosen, row_tokens, packed, torch.device("cpu"))
    trained = int(data.trained_counts[chosen].sum())
    result = train_step(base.model, rows, trained, parameters, optimizer, 0.0, Devices(), balance)
    assert result.router is not None
    return {name: gradient for (name, _), gradient in zip(named, optimizer.seen, strict=True)}, result.router


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_gradients_with_the_routers_balance_do_not_depend_on_rows_packing_or_recomputation(
    tmp_path: Path, quantization: str
) -> None:
    base = write_model(tmp_path / "base", "mixtral", num_local_experts=8)
    recipe = tiny_recipe(tmp_path, base=base, model__quantization=quantization, adapter__targets=["attention"])
    reference, load = mixture_step(recipe, 10**6, packed=False)
    without, _ = mixture_step(recipe, 10**6, packed=False, weight=0.0)
    assert load.balance > 2.1, "the case does not show what it should"
    for name, gradient in reference.items():
        assert relative(without[name], gradient) > 0.01, f"the balance has no part in the gradient of {name}"
    for row_tokens, packed, recompute in (
        (64, True, False),
        (512, True, False),
        (10**6, True, False),
        (64, True, True),
        (10**6, True, True),
        (10**6, False, True),
    ):
        ours, told = mixture_step(recipe, row_tokens, packed, recompute)
        assert told.counts == load.counts
        assert told.balance == pytest.approx(load.balance, rel=1e-6)
        for name, gradient in reference.items():
            assert relative(ours[name], gradient) < 1e-5, (name, row_tokens, packed, recompute)


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_the_adapter_after_ten_steps_does_not_depend_on_rows_or_packing(tmp_path: Path, family: str) -> None:
    adapters = []
    changes = {"model__quantization": "none", "adapter__targets": ["attention"]} if family == "mixtral" else {}
    for number, row_tokens in enumerate((64, 100_000)):
        changes |= {"output": tmp_path / f"run{number}", "train__micro_batch_tokens": row_tokens}
        recipe = tiny_recipe(tmp_path, family, **changes)
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
