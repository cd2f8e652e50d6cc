"""Whatever a recipe file holds, reading it ends in a Recipe or a RecipeError, never in anything else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from tune.errors import RecipeError
from tune.recipe.load import load_recipe, recipe_to_yaml, shipped_recipes
from tune.recipe.schema import Recipe

FRAGMENTS = [
    "\t",
    ":",
    "- ",
    "[",
    "}",
    "'",
    '"',
    "&a ",
    "*a",
    "!!",
    "|",
    ">",
    "#",
    "\n",
    "\x00",
    "é",
    "<<: ",
    "? ",
    "%",
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e400,
    float("nan"),
    "",
    "none",
    "1e99",
    [],
    {},
    [[]],
    {"a": {}},
    "\ud800",
    "9" * 400,
]


def mutate_text(text: str, draw: random.Random) -> str:
    for _ in range(draw.randint(1, 6)):
        at = draw.randrange(len(text))
        how = draw.randrange(3)
        if how == 0:
            text = text[:at] + draw.choice(FRAGMENTS) + text[at:]
        elif how == 1:
            text = text[:at] + text[at + draw.randint(1, 5) :]
        else:
            there = draw.randrange(len(text))
            text = text[:at] + text[there : there + 20] + text[at:]
        text = text or "-"
    return text


def mutate_values(values: Any, draw: random.Random) -> None:
    """Replace, add or remove something at a random place of nested dicts and lists."""
    while isinstance(values, dict | list) and values:
        key = draw.choice(list(values)) if isinstance(values, dict) else draw.randrange(len(values))
        if isinstance(values[key], dict | list) and values[key] and draw.random() < 0.8:
            values = values[key]
            continue
        how = draw.randrange(3)
        if how == 0:
            values[key] = draw.choice(VALUES)
        elif how == 1:
            del values[key]
        elif isinstance(values, dict):
            values[draw.choice(["lora_r", "rank", "sources", "0", "path", ""])] = draw.choice(VALUES)
        return


def outcome(recipe: Any, overrides: list[str], folder: Path) -> str:
    try:
        read = load_recipe(recipe, overrides)
    except RecipeError as error:
        problems = error.problems
    else:
        assert isinstance(read, Recipe)
        resolved = folder / "resolved.yaml"
        resolved.write_text(recipe_to_yaml(read), encoding="utf-8")
        assert load_recipe(resolved) == read
        return "read"
    assert problems
    for problem in problems:
        assert "\n" not in problem
        problem.encode()
    return "refused"


@pytest.mark.parametrize("seed", range(3))
def test_no_mutation_raises_anything_else(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    texts = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
    path = tmp_path / "recipe.yaml"
    outcomes = []
    for number in range(100):
        text = draw.choice(texts)
        overrides = [mutate_text("data.train.0.limit=5", draw)] if number % 5 == 0 else []
        if number % 2:
            path.write_bytes(mutate_text(text, draw).encode("utf-8", "surrogatepass"))
            outcomes.append(outcome(path, overrides, tmp_path))
        else:
            values = yaml.safe_load(text)
            for _ in range(draw.randint(1, 4)):
                mutate_values(values, draw)
            outcomes.append(outcome(values, overrides, tmp_path))
    assert outcomes.count("refused") > 50
    assert outcomes.count("read") > 2
