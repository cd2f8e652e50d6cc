"""What is refused for now is said in words, by key; everything else passes."""

from __future__ import annotations

import pytest

from tune.recipe.fields import FORMATS, TEMPLATES
from tune.recipe.later import FORMATS_LATER, TEMPLATES_LATER, refusals
from tune.recipe.load import load_recipe

SMALLEST = ["model.base=some/model", "data.train=a.jsonl"]


@pytest.mark.parametrize(
    ("setting", "start"),
    [
        ("data.add_tokens=true", "data.add_tokens: "),
        ("data.template=own.jinja", "data.template: a template of your own is not in this version (own.jinja)."),
        ("data.train=[a, {path: b, template: koala}]", "data.train[1].template: the template koala is not"),
        ("data.eval=[{path: b, format: text}]", "data.eval[0].format: the format text is not"),
    ],
)
def test_what_is_not_built_yet_is_refused(setting: str, start: str) -> None:
    (words,) = refusals(load_recipe({}, [*SMALLEST, setting]))
    assert words.startswith(start)
    assert words.endswith(".")


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
    ]
    assert refusals(load_recipe({}, SMALLEST + settings)) == []
