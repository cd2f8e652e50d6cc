"""What is refused for now is said in words, by key; everything else passes."""

from __future__ import annotations

import pytest

from tune.recipe import later
from tune.recipe.fields import FORMATS, TEMPLATES
from tune.recipe.later import FORMATS_LATER, TEMPLATES_LATER, refusals
from tune.recipe.load import load_recipe

SMALLEST = ["model.base=some/model", "data.train=a.jsonl"]


def test_what_is_not_built_yet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["data.train=[a, {path: b, template: koala}]", "data.eval=[{path: b, format: text}]", "data.system=s"]
    recipe = load_recipe({}, [*SMALLEST, *settings])
    assert refusals(recipe) == []
    monkeypatch.setattr(later, "FORMATS_LATER", ("text",))
    monkeypatch.setattr(later, "TEMPLATES_LATER", ("koala",))
    single = later.Later(lambda recipe: recipe.data.system is not None, "data.system", "not in this version.")
    monkeypatch.setattr(later, "_SINGLE", (single,))
    system, form, template = refusals(recipe)
    assert system == "data.system: not in this version."
    assert form.startswith("data.eval[0].format: the format text is not in this version. Write one of auto, alpaca, ")
    assert template.startswith("data.train[1].template: the template koala is not in this version. Write one of auto, ")
    assert ", text" not in form
    assert ", koala" not in template


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_built_or_refused(name: str) -> None:
    recipe = load_recipe({}, [*SMALLEST, f"data.train={{path: a, format: {name}}}"])
    assert len(refusals(recipe)) == (name in FORMATS_LATER)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_built_or_refused(name: str) -> None:
    recipe = load_recipe({}, [*SMALLEST, f"data.template={name}"])
    assert len(refusals(recipe)) == (name in TEMPLATES_LATER)


def test_the_rest_passes() -> None:
    settings = [
        "adapter.targets=[experts, router]",
        "tracking.to=[wandb, tensorboard, trackio]",
        "train.optimizer=paged_adamw_8bit",
        "data.eval=0.1",
        "data.add_tokens=true",
    ]
    assert refusals(load_recipe({}, SMALLEST + settings)) == []
