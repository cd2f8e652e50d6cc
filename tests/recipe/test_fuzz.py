"""Whatever a recipe file holds, reading it ends in a Recipe or a RecipeError, never in anything else."""

from __future__ import annotations

import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml

from tune.cli.main import _run
from tune.errors import RecipeError
from tune.recipe.load import load_recipe, recipe_to_yaml, shipped_recipes
from tune.recipe.schema import Recipe
from tune.secrets import same_but_hidden

FRAGMENTS = [
    *("\t", ":", "- ", "[", "}", "'", '"', "&a ", "*a", "!!", "|", ">", "#", "\n", "\x00", "é", "<<: ", "? ", "%"),
    *(
        "---\n",
        "...\n",
        "!!python/object/apply:os.system [id]",
        "!!binary ",
        "\r\n",
        "\x85",
        "\u2028",
        "\u202e",
        "\ufeff",
    ),
    *("{" * 40, "- " * 60, "'\\ud800'", '"\\x07"', "\ud800", "\U0001f642", "0x1F", "1_000", "12:30:45", "=", "&a [*a]"),
]
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3.5, 1e400, -1e400, float("nan"), 10**30, -0.0),
    *("", " ", "none", "None", "auto", "true", "1e99", "1e-400", "0.5", "９", "1_000", "0x10", "2e-4", "nf4", "NF4"),
    *(
        "\ud800",
        "9" * 400,
        "a\nb",
        "\x1b[31mred",
        "~",
        "é" * 300,
        "../" * 50,
        "hf_abcdefghijklmnop",
        "{{ 7 * 7 }}",
        "%s %d {}",
    ),
    *([], {}, [[]], {"a": {}}, [None], ["", ""], ["attention", "attention"], [1, {"path": 2}], {"path": "x"}),
    *(
        {"path": ["x"]},
        {"path": "x", "weight": -1},
        {"path": "x", "columns": ["a"]},
        [{"path": "x", "columns": {"": ""}}],
    ),
    *(b"bytes", (1, 2), {1: 2}, {"": ""}, {"a\nb": 1}),
]
NAMES = [
    *(
        "lora_r",
        "rank",
        "sources",
        "0",
        "path",
        "",
        "Rank",
        "learning-rate",
        "model.base",
        "a b",
        "é",
        "\ud800",
        "__class__",
    ),
    *("model_config", "base", "eval", "columns", "weight", "limit", "template", "load_in_4bit", "x" * 500),
]
LINE = re.compile(r"recipe(\.yaml(:\d+)?)?: |\S.*\(command line\): ", re.DOTALL)
"""How a problem begins: with the file and mostly the line, or with the override."""


def mutate_text(text: str, draw: random.Random) -> str:
    """Insert, delete, copy, replace or exchange, a few times: seldom YAML, and seldom far from it."""
    for _ in range(draw.randint(1, 6)):
        at, there = draw.randrange(len(text)), draw.randrange(len(text))
        how = draw.randrange(6)
        if how == 0:
            text = text[:at] + draw.choice(FRAGMENTS) + text[at:]
        elif how == 1:
            text = text[:at] + text[at + draw.randint(1, 5) :]
        elif how == 2:
            text = text[:at] + text[there : there + 20] + text[at:]
        elif how == 3:
            text = text[:at] + draw.choice(string.printable) + text[at + 1 :]
        elif how == 4:
            lines = text.split("\n")
            line = draw.randrange(len(lines))
            lines[line] = " " * draw.randrange(5) + lines[line].strip()
            text = "\n".join(lines)
        else:
            lines = text.split("\n")
            lines.insert(draw.randrange(len(lines)), lines.pop(draw.randrange(len(lines))))
            text = "\n".join(lines)
        text = text or "-"
    return text


def mutate_values(values: Any, draw: random.Random) -> None:
    """Replace, add, wrap or remove something at a random place of nested dicts and lists."""
    while isinstance(values, dict | list) and values:
        key = draw.choice(list(values)) if isinstance(values, dict) else draw.randrange(len(values))
        if isinstance(values[key], dict | list) and values[key] and draw.random() < 0.8:
            values = values[key]
            continue
        how = draw.randrange(5)
        if how == 0:
            values[key] = draw.choice(VALUES)
        elif how == 1:
            del values[key]
        elif how == 2:
            values[key] = draw.choice([[values[key]], {"path": values[key]}, {key: values[key]}])
        elif how == 3:
            inside = values[key]
            for _ in range(draw.choice([2, 40, 2000])):
                inside = [inside] if draw.random() < 0.5 else {"a": inside}
            values[key] = inside
        elif isinstance(values, dict):
            values[draw.choice(NAMES)] = draw.choice(VALUES)
        return


def mutated(draw: random.Random, number: int) -> tuple[str | dict[str, Any], list[str]]:
    """A spoiled shipped recipe, as text or as a mapping, and spoiled overrides for some."""
    text = draw.choice([path.read_text(encoding="utf-8") for path in shipped_recipes().values()])
    written = ["data.train.0.limit=5", "train.learning_rate=1e-4", "adapter.targets=[attention, mlp]", "data.eval=0.1"]
    overrides = [mutate_text(draw.choice(written), draw) for _ in range(draw.randint(1, 3))] if number % 5 == 0 else []
    if number % 2:
        return mutate_text(text, draw), overrides
    values = yaml.safe_load(text)
    for _ in range(draw.randint(1, 4)):
        mutate_values(values, draw)
    return values, overrides


def outcome(recipe: Any, overrides: list[str], folder: Path) -> str:
    try:
        read = load_recipe(recipe, overrides)
    except RecipeError as error:
        problems = error.problems
    else:
        assert isinstance(read, Recipe)
        resolved = folder / "resolved.yaml"
        resolved.write_text(recipe_to_yaml(read), encoding="utf-8")
        assert same_but_hidden(load_recipe(resolved).model_dump(mode="json"), read.model_dump(mode="json"))
        return "read"
    assert problems
    for problem in problems:
        assert "\n" not in problem
        assert problem.isprintable(), problem
        assert len(problem) < 1000, problem
        assert LINE.match(problem.removeprefix(f"{folder}/")), problem
        assert problem.rstrip()[-1] in ".?", problem
        problem.encode()
    return "refused"


def fuzz(seed: int, count: int, folder: Path) -> None:
    draw = random.Random(seed)
    path = folder / "recipe.yaml"
    outcomes = []
    for number in range(count):
        recipe, overrides = mutated(draw, number)
        if isinstance(recipe, str):
            path.write_bytes(recipe.encode("utf-8", "surrogatepass"))
            outcomes.append(outcome(path, overrides, folder))
        else:
            outcomes.append(outcome(recipe, overrides, folder))
    assert outcomes.count("refused") > count // 2
    assert outcomes.count("read") > count // 50


@pytest.mark.parametrize("seed", range(4))
def test_no_mutation_raises_anything_else(seed: int, tmp_path: Path) -> None:
    fuzz(seed, 500, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 44))
def test_no_mutation_raises_anything_else_at_length(seed: int, tmp_path: Path) -> None:
    fuzz(seed, 500, tmp_path)


def test_the_command_says_it_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through `tune check`; the bases are not here, so that a recipe which can be read ends there at the latest."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    codes = []
    for number in range(1, 121, 2):
        text, _ = mutated(draw, number)
        assert isinstance(text, str)
        Path("recipe.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        codes.append(_run(["check", "recipe.yaml"]))
        out, err = capfd.readouterr()
        assert codes[-1] == 2, text
        assert err.strip(), text
        assert not re.search(r"Traceback|\b[A-Z]\w*(Error|Exception)\b", err), err
        assert "usable" not in out
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
