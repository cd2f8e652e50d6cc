"""`tune recipes`: the shipped recipes, one of them, or the JSON Schema.

Without a name it lists the recipes that come with the program, each with the first line of its file. With a name it
prints that recipe, comments included, so that `tune recipes NAME > mine.yaml` works too. `--copy` writes NAME.yaml
into the working directory and says how to start it; a file that is there already is never overwritten.

`--schema` prints the JSON Schema of a recipe, with the description, default and limits of each key. An editor that
reads YAML with a schema completes keys from it and marks mistakes.

## What can go wrong

An unknown name, `--copy` without a name, and a file in the way are told with exit code 2. A recipe that waits for
something not built yet is listed with the words "not in this version yet", and `tune train` refuses it.

## Example

```console
$ tune recipes quickstart --copy
quickstart.yaml is here. Next: tune train quickstart.yaml
```
"""

from __future__ import annotations

import json
from pathlib import Path

from tune.cli.program import command
from tune.errors import RecipeError, did_you_mean


def recipes(name: str | None = None, copy: bool = False, schema: bool = False) -> None:
    """List the shipped recipes, print or copy the one called `name`, or print the JSON Schema.

    Raises RecipeError for an unknown name, for `copy` without a name, and where a copy would overwrite a file.
    """
    # Imported here, as every verb's rooms are, so that `tune --help` pays for none of them.
    from tune.recipe.later import refusals
    from tune.recipe.load import json_schema, load_recipe, shipped_recipes

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    shipped = shipped_recipes()
    if name is None:
        if copy:
            raise RecipeError(
                f"--copy: needs a name. Write `tune recipes NAME --copy`; there are {', '.join(shipped)}."
            )
        width = max(map(len, shipped), default=0)
        for stem, path in shipped.items():
            waits = " (not in this version yet)" if refusals(load_recipe(path)) else ""
            print(f"{stem:<{width}}  {_description(path)}{waits}")
        return
    stem = name.removesuffix(".yaml")
    if stem not in shipped:
        raise RecipeError(
            f"{name}: is not a shipped recipe. There are {', '.join(shipped)}.{did_you_mean(stem, shipped)}"
        )
    if copy:
        _copy(shipped[stem])
    else:
        print(shipped[stem].read_text(encoding="utf-8"), end="")


def _description(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()


def _copy(source: Path) -> None:
    target = Path(source.name)
    try:
        # Exclusive creation: a recipe that someone has edited is never lost, not even to a race.
        with open(target, "x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise RecipeError(f"{target}: exists already and is not overwritten. Move it, or copy elsewhere.") from None
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written ({error.strerror}). Choose another folder.") from None
    print(f"{target} is here. Next: {command('train', str(target))}")
