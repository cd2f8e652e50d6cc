"""However a step is split over rows, packing and processes, it is the same step: one matrix, every cell of it run.

In float32, against one example a row in one process: the gradients of a step within 1e-5, the adapter after ten
steps at a learning rate of 0.01 within 1e-4, for each tensor by the Euclidean norm.

The second bound holds for most models and not for all: AdamW makes a step of the learning rate from a gradient that
is nearly zero, and a router chooses between experts that nearly tie, so that an unlucky element or token turns
rounding into a difference of its own. The gradients of a single step know no such luck, and are held for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.distributed.ranks import finish, start_work
from tests.tiny import VOCABULARY, write_model
from tests.training.jobs import tiny_recipe
from tune.adapters.lora import adapter_parameters, attach
from tune.data.batches import Order, deal, one_a_row, pack
from tune.data.examples import Examples
from tune.folder import RunFolder
from tune.models.load import load_base
from tune.planning.memory import RowPlan
from tune.progress import Progress
from tune.recipe.schema import Recipe
from tune.training.devices import Devices
from tune.training.trainer import Job, Trainer

MIXTURE = {"num_local_experts": 8}
BALANCED = {"router__balance_loss": 1.0}
ALL = {"adapter__targets": ["attention", "experts"]}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral": ("mistral", {}, {}),
    "mistral with a window": ("mistral", {"sliding_window": 16}, {}),
    "mixtral": ("mixtral", MIXTURE, {**BALANCED, **ALL, "model__quantization": "none"}),
}
"""Family, what to change in the model, what to change in the recipe. The balance of a mixture outweighs its loss."""

MORE_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mistral, not quantised": ("mistral", {}, {"model__quantization": "none"}),
    "mixtral in nf4": ("mixtral", {**MIXTURE, "seed": 1}, {**BALANCED, **ALL}),
    "mixtral with a window, attention alone": (
        "mixtral",
        {**MIXTURE, "sliding_window": 16},
        {**BALANCED, "adapter__targets": ["attention"], "model__quantization": "none"},
    ),
    "mixtral with its router": (
        "mixtral",
        MIXTURE,
        {**BALANCED, "adapter__targets": ["attention", "experts", "router"], "model__quantization": "none"},
    ),
}

LAYOUTS: dict[str, tuple[int, bool]] = {
    "one a row": (10**6, False),
    "rows of 64": (64, True),
    "rows of 512": (512, True),
    "the whole step": (10**6, True),
}
"""Tokens of a row, and whether examples share rows."""

BOUNDS = {"gradient": 1e-5, "adapter": 1e-4}


class Subject(NamedTuple):
    """A case, loaded once for all layouts and processes."""

    recipe: Recipe
    data: Examples
    model: PeftModel
    initial: dict[str, Tensor]


def examples() -> Examples:
    """40 examples: half of 8 to 30 tokens, of which a row of 64 holds some, and half of 100 to 160."""
    random = np.random.default_rng(0)
    lengths = np.concatenate([random.integers(8, 31, 20), random.integers(100, 161, 20)])
    ids = [random.integers(2, VOCABULARY, length).tolist() for length in lengths]
    return Examples.of(ids, [[place >= length // 3 for place in range(length)] for length in lengths])


def load(folder: Path, family: str, sizes: dict[str, Any], changes: dict[str, Any]) -> Subject:
    base = write_model(folder / "base", family, **sizes)
    recipe = tiny_recipe(folder, base=base, **changes)
    loaded = load_base(recipe.model, torch.device("cpu"))
    assert loaded.packs
    model = attach(loaded, recipe.adapter, "tiny", 0, recipe.router)
    return Subject(recipe, examples(), model, {name: p.detach().clone() for name, p in adapter_parameters(model)})


class Kept(torch.optim.SGD):
    """Keeps the gradients of the step and changes nothing."""

    seen: list[Tensor]

    def step(self, closure: Any = None) -> None:
        self.seen = [parameter.grad.clone() for group in self.param_groups for parameter in group["params"]]


def trainer_of(subject: Subject, layout: str, devices: Devices, **changes: Any) -> Trainer:
    row_tokens, packs = LAYOUTS[layout]
    recipe = subject.recipe.model_copy(update={"train": subject.recipe.train.model_copy(update=changes)})
    job = Job(
        recipe=recipe,
        run=RunFolder(Path("nowhere")),
        model=subject.model,
        train=subject.data,
        held_out=None,
        data_fingerprint="",
        base_fingerprint="",
        packs=packs,
        rows=RowPlan(row_tokens, "none"),
        devices=devices,
        progress=Progress(),
    )
    trainer = Trainer(job, None)
    trainer.network.train()
    return trainer


def gradients(subject: Subject, layout: str, devices: Devices) -> dict[str, Tensor]:
    """Of one step of 16 examples, of an adapter in which A and B take part, on a mixture that was out of balance."""
    trainer = trainer_of(subject, layout, devices, batch_size=16, max_grad_norm=0.0)
    with torch.no_grad():
        for name, parameter in trainer.named:
            parameter.copy_(subject.initial[name])
            if "lora_B" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    trainer.optimizer = kept = Kept(trainer.parameters, lr=1.0)
    if trainer.routers is not None:
        previous = [800, 600, 400, 200, 100, 60, 30, 10]
        trainer.state.expert_counts = [previous, previous[::-1]]
    trainer._one_step()
    return {name: gradient for (name, _), gradient in zip(trainer.named, kept.seen, strict=True)}


def adapter(subject: Subject, layout: str, devices: Devices) -> dict[str, Tensor]:
    """After ten steps of 8 examples."""
    trainer = trainer_of(subject, layout, devices)
    assert trainer.total == 10
    assert trainer.job.recipe.train.learning_rate == 0.01
    with torch.no_grad():
        for name, parameter in trainer.named:
            parameter.copy_(subject.initial[name])
    for _ in range(trainer.total):
        trainer._one_step()
    return {name: parameter.detach().clone() for name, parameter in trainer.named}


def measure(subjects: dict[str, Subject], devices: Devices, file: Path) -> None:
    """Write every gradient and adapter of this process."""
    found = {}
    for case, subject in subjects.items():
        for layout in LAYOUTS:
            for kind, work in (("gradient", gradients), ("adapter", adapter)):
                for name, tensor in work(subject, layout, devices).items():
                    found[f"{case}|{layout}|{kind}|{name}"] = tensor
    save_file(found, file)


Results = list[dict[str, Tensor]]
"""One process alone, and each of two: by case, layout, kind and name."""


def run_matrix(folder: Path, cases: dict[str, tuple[str, dict[str, Any], dict[str, Any]]]) -> Results:
    subjects = {case: load(folder / str(number), *cases[case]) for number, case in enumerate(cases)}

    def work(rank: int) -> None:
        devices = Devices()
        assert devices.line == "devices 2 ddp"
        measure(subjects, devices, folder / f"rank{rank}.safetensors")

    children = start_work(work, 2, folder / "log")
    measure(subjects, Devices(), folder / "alone.safetensors")
    assert finish(children) == [0, 0], (folder / "log.0").read_text() + (folder / "log.1").read_text()
    return [load_file(folder / f"{name}.safetensors") for name in ("alone", "rank0", "rank1")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_matrix(tmp_path_factory.mktemp("matrix"), CASES)


@pytest.fixture(scope="module")
def more_results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_matrix(tmp_path_factory.mktemp("matrix"), MORE_CASES)


def relative(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.double(), reference.double()
    return float((ours - reference).norm() / reference.norm())


def check(results: Results, case: str, kind: str, processes: int, layout: str) -> None:
    alone, first, second = results
    names = [key.rsplit("|", 1)[1] for key in alone if key.startswith(f"{case}|one a row|{kind}|")]
    assert len(names) >= 16, "two layers, four linears, A and B"
    for name in names:
        reference, key = alone[f"{case}|one a row|{kind}|{name}"], f"{case}|{layout}|{kind}|{name}"
        assert reference.norm() > 0, name
        if processes == 2:
            assert torch.equal(first[key], second[key]), "the processes part"
        assert relative((alone if processes == 1 else first)[key], reference) < BOUNDS[kind], name


CELLS = [pytest.param(1, layout, id=f"1 process-{layout}") for layout in list(LAYOUTS)[1:]] + [
    pytest.param(2, layout, id=f"2 processes-{layout}") for layout in LAYOUTS
]


@pytest.mark.parametrize(("processes", "layout"), CELLS)
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_however_it_is_split(
    results: Results, case: str, kind: str, processes: int, layout: str
) -> None:
    check(results, case, kind, processes, layout)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "layout"), CELLS)
@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("case", MORE_CASES)
def test_so_it_is_for_more_models(more_results: Results, case: str, kind: str, processes: int, layout: str) -> None:
    check(more_results, case, kind, processes, layout)


@pytest.mark.parametrize(
    ("batch_size", "steps", "different"),
    # Of 8 examples one of two devices has less than 512 tokens.
    [pytest.param(16, 1, 8, id="gradient"), pytest.param(8, 10, 7, id="adapter")],
)
def test_the_layouts_differ(batch_size: int, steps: int, different: int) -> None:
    """Else a cell of the matrix would only repeat its neighbour."""
    data = examples()
    order, seen = Order(data.source, (1.0,), batch_size, 0), set()
    for devices in (1, 2):
        for row_tokens, packs in LAYOUTS.values():
            shares = [share for step in range(steps) for share in deal(order.step(step), data.lengths, devices)]
            rows = [pack(s, data.lengths, row_tokens) if packs else one_a_row(s, data.lengths) for s in shares]
            seen.add((devices, str(rows)))
    assert len(seen) == different


def test_the_cases_show_what_they_should(results: Results, tmp_path: Path) -> None:
    """The window and the balance have a part in the gradients: without them these would be others."""
    alone = results[0]

    def of(case: str) -> Tensor:
        return torch.cat([t.flatten() for key, t in alone.items() if key.startswith(f"{case}|one a row|gradient|")])

    assert relative(of("mistral with a window"), of("mistral")) > 0.01
    family, sizes, changes = CASES["mixtral"]
    unbalanced = gradients(
        load(tmp_path, family, sizes, {**changes, "router__balance_loss": 0.0}), "one a row", Devices()
    )
    for name, gradient in unbalanced.items():
        if "layers.1.mlp.experts" not in name:  # no router comes after them
            assert relative(gradient, alone[f"mixtral|one a row|gradient|{name}"]) > 0.01, name
