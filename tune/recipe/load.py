"""`load_recipe`: a file or mapping, and overrides, to a frozen Recipe, or to every problem at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tune.errors import RecipeError
from tune.recipe.problems import explain, explain_conflicts
from tune.recipe.read import Written, apply_overrides, read_file, read_mapping, shown
from tune.recipe.schema import Recipe
from tune.secrets import redact_all

# In a clone this folder is a link to recipes/; in a wheel it holds the files.
_SHIPPED = Path(__file__).parent / "shipped"


def load_recipe(recipe: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: a YAML file, or the same content as a mapping.
        overrides: `section.key=VALUE` with VALUE in YAML, such as `train.learning_rate=1e-4`; later ones win.

    Returns:
        The recipe with every default filled in; `output` is runs/RECIPE-NAME where it was absent.

    Raises:
        RecipeError: with one line for each problem, in the order of the file:
            `file:line: key: what is wrong (value). Remedy.`
    """
    if isinstance(recipe, Mapping):
        written, name = read_mapping(recipe), "recipe"
    else:
        path = Path(recipe)
        _refuse_what_is_no_file(path)
        written, name = read_file(path), path.stem
    apply_overrides(written, overrides)
    return _validate(written, f"runs/{name}")


def recipe_to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, defaults included, as YAML that `load_recipe` reads back to an equal one.

    Secrets in it are hidden, value by value: a number is never taken for one.
    """
    values = redact_all(recipe.model_dump(mode="json"))
    for key in ("train", "eval"):
        if isinstance(values["data"][key], list):
            values["data"][key] = [
                {name: value for name, value in source.items() if value not in (None, {})}
                for source in values["data"][key]
            ]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def hidden_keys(recipe: Recipe) -> list[str]:
    """The keys, dotted, in whose place `recipe_to_yaml` writes `***` for a secret."""

    def leaves(value: Any, key: str) -> Iterator[str]:
        if isinstance(value, dict):
            for name, inner in value.items():
                yield from leaves(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                yield from leaves(inner, f"{key}.{number}")
        elif redact_all(value) != value:
            yield key

    return list(leaves(recipe.model_dump(mode="json"), ""))


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors; descriptions carry units."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the program: name to file, in alphabetical order."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}


def _validate(written: Written, output: str) -> Recipe:
    values = {"model": {}, "data": {}, **written.values}
    lines = list(written.problems)
    recipe = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        more, suspects = explain(error, written)
        lines += more
        lines += _conflicts_despite(values, suspects, written)
    if recipe is None or lines:
        raise RecipeError([line for _, line in sorted(lines, key=lambda item: item[0])])
    return recipe if recipe.output is not None else recipe.model_copy(update={"output": output})


def _conflicts_despite(values: dict[str, Any], suspects: set[str], written: Written) -> list[tuple[int, str]]:
    """Contradictions among the keys whose values are right, so that they are not found one run later."""
    trial = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for suspect in suspects:
        section, _, key = suspect.partition(".")
        if key and isinstance(trial.get(section), dict):
            trial[section].pop(key, None)
        else:
            trial.pop(section, None)
    for section, key in (("model", "base"), ("data", "train")):
        given = trial.get(section)
        trial[section] = {key: "unknown", **(given if isinstance(given, dict) else {})}
    try:
        Recipe.model_validate(trial)
    except ValidationError as error:
        return explain_conflicts(error, written, suspects)
    return []


def _refuse_what_is_no_file(path: Path) -> None:
    name = shown(path, 200)
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
        remedy = f"Name a file in it, such as {shown(path / files[0], 200)}." if files else "Name a YAML file."
        raise RecipeError(f"{name}: is a folder, not a recipe. {remedy}")
    if path.exists():
        return
    if path.stem in shipped_recipes():
        remedy = f"It ships with the program: `tune recipes {path.stem} --copy` puts it here."
        raise RecipeError(f"{name}: there is no such file. {remedy}")
    try:
        beside = [file.name for file in path.parent.iterdir() if file.is_file()]
    except OSError:
        folder = shown(path.parent, 200)
        raise RecipeError(f"{name}: there is no folder {folder}. `tune recipes` lists the shipped recipes.") from None
    recipes = [file for file in beside if file.endswith((".yaml", ".yml"))]
    wanted = path.name if path.suffix else f"{path.name}.yaml"
    near = difflib.get_close_matches(wanted, recipes, n=1) or difflib.get_close_matches(path.name, beside, n=1)
    near = near or difflib.get_close_matches(path.stem, shipped_recipes(), n=1)
    remedy = f"Did you mean {near[0]!r}?" if near else "`tune recipes` lists the shipped recipes."
    raise RecipeError(f"{name}: there is no such file. {remedy}")
