"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tune.cli.main import app
from tune.recipe.load import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_recipe_is_the_shipped_one() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert load_recipe(yaml.safe_load(block)) == load_recipe(shipped_recipes()["mistral-alpaca"])


def test_its_table_lists_every_verb_once() -> None:
    shown = re.findall(r"^\| `tune (\w+)", README, re.M)
    assert sorted(shown) == sorted(command.callback.__name__ for command in app.registered_commands if command.callback)


def test_every_file_and_script_it_names_is_there() -> None:
    named = re.findall(r"\b((?:scripts|benchmarks|tests|recipes)/[\w./-]*[\w])", README)
    assert len(named) > 8
    assert not [name for name in named if not (ROOT / name).exists()]
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists()


def test_it_says_of_torchtune_and_of_what_was_not_tried() -> None:
    assert "torchtune" in README
    assert "python -m tune" in README
    assert "has not been run yet" in README
