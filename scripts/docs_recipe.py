"""The text of docs/recipe.md, for scripts/docs.py: every key of a recipe in a reader's words.

Types, ranges, defaults and explanations come from `tune.recipe`; only how the parts hang together is written here.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from tune.errors import RecipeError
from tune.recipe.conflicts import TARGET_KINDS
from tune.recipe.elsewhere import KEYS, VALUES
from tune.recipe.later import refusals
from tune.recipe.load import json_schema, load_recipe
from tune.recipe.schema import Recipe, Source

SOURCE_ANCHOR = "an-item-of-datatrain"
JINJA = "a path that ends in `.jinja`"
YOURS = "yours.jinja"
INTRO = """\
A recipe is a YAML file of sections and keys. Required are {required}.
Every other key has a default. A key that does not exist, a value out of range or two keys that contradict each other
are refused before anything is loaded, with file and line, all at once. Relative paths start at the working directory.

`tune recipes` lists recipes to start from, and `tune recipes --schema` prints the JSON Schema for an editor."""
OVERRIDES = """\
`train`, `check` and `preview` take changes after the recipe:

```
{example}
```

Each is `section.key=VALUE`, and VALUE is YAML. They are applied in order, so the last of two for the same key counts.
The items of a list are numbered from 0, and a single source counts as a list of one. `none` means "not set" at every
key whose values include it. Names may stand in a YAML list or with commas between. A value replaces the whole of what
the recipe says for its key; it is not merged with it."""
EXAMPLE = (
    "train.learning_rate=1e-4",
    "train.max_steps=none",
    "adapter.targets=attention,mlp",
    "adapter.ranks={mlp: 8}",
    "data.train.0.limit=100",
)
"""Each must be accepted: a test reads it."""
AUTO = """\
At these keys `auto` leaves the choice to tune. `tune check` prints the format and the template that it comes to, and a
run prints the length of its rows, and `recomputed` where activations are, before its first step. A resumed run keeps
what `auto` chose at its start."""
LATER = """\
The schema holds these so that a recipe written today stays valid. Each is refused before anything is loaded."""
ELSEWHERE = """\
A recipe that uses another program's name for a key is refused with the name it has here."""
ELSEWHERE_VALUES = "The same holds for values."


def table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def listed(words: list[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def number(value: float) -> str:
    return "10⁹" if value == 10**9 else f"{value:.10g}"


def limits(schema: dict[str, Any]) -> str:
    """The range of a number, with a space before it: ` from 0 to below 1`, ` above 0`, `, at least 0`."""
    bounded = schema.keys() & {"maximum", "exclusiveMaximum"}
    said = {
        "minimum": " from" if bounded else ", at least",
        "exclusiveMinimum": " above",
        "maximum": " to" if "minimum" in schema else ", at most",
        "exclusiveMaximum": " to below",
    }
    return "".join(f"{words} {number(schema[key])}" for key, words in said.items() if key in schema)


def kinds(schema: dict[str, Any]) -> list[str]:
    """The ways to write a value of this JSON Schema, each in a reader's words."""
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return list(dict.fromkeys(words for part in schema[key] for words in kinds(part)))
    if "$ref" in schema:
        return [f"[an item](#{SOURCE_ANCHOR})"]
    if "const" in schema:
        return [f"`{schema['const']}`"]
    if "enum" in schema:
        return [f"`{value}`" for value in schema["enum"]]
    if schema["type"] == "array":
        return ["a list of " + ", ".join(kinds(schema["items"])).replace("[an item]", "[items]")]
    if schema["type"] == "object":
        return [f"a mapping from name to {listed(kinds(schema['additionalProperties']))}"]
    if "pattern" in schema:
        return [JINJA if schema["pattern"] == r"\.jinja$" else f"text that matches `{schema['pattern']}`"]
    if schema["type"] in ("integer", "number"):
        return [("whole number" if schema["type"] == "integer" else "number") + limits(schema)]
    return {"boolean": ["`true`", "`false`"], "null": ["`none`"], "string": ["text"]}[schema["type"]]


def shown_default(value: Any) -> str:
    """A default as it would be written in a recipe."""
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{number(value)}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(value)}]`"
    return f"`{value}`"


def smallest(*overrides: str) -> Recipe:
    """A recipe with what is required and nothing else, read from a file called RECIPE-NAME.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "RECIPE-NAME.yaml"
        path.write_text("model: {base: a}\ndata: {train: b}\n", encoding="utf-8")
        return load_recipe(path, overrides)


def choices(schema: dict[str, Any]) -> list[str]:
    """The words among the values of a key, without the marks around them."""
    return [words.strip("`") for words in kinds(schema) if words.startswith("`")]


def probes(key: str, schema: dict[str, Any]) -> list[str]:
    """Values of a key that a version might not have built yet."""
    more = {"adapter.targets": list(TARGET_KINDS), "push.repo": ["OWNER/NAME"]}.get(key, [])
    return [*choices(schema), *more, *([YOURS] if JINJA in kinds(schema) else [])]


def properties() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each key below the sections, dotted, with its JSON Schema; an item's keys stand under data.train."""
    schema = json_schema()
    for section, reference in schema["properties"].items():
        definition = schema["$defs"].get(reference.get("$ref", "").rpartition("/")[2])
        for key, inner in (definition or {"properties": {}})["properties"].items():
            yield f"{section}.{key}", inner
    for key, inner in schema["$defs"]["Source"]["properties"].items():
        yield f"data.train.{key}", inner


def refused() -> dict[str, dict[str, str]]:
    """What this version refuses: key, then value, then the words of the refusal without the key."""
    found: dict[str, dict[str, str]] = {}
    for key, schema in properties():
        for value in probes(key, schema):
            written = key.replace("data.train.", "data.train.0.") if key.count(".") == 2 else key
            try:
                problems = refusals(smallest(f"{written}={value}"))
            except RecipeError:
                continue  # it contradicts another key, which is no matter of versions
            for problem in problems:
                found.setdefault(key, {})[value] = problem.partition(": ")[2]
    return found


def section_table(kind: type[BaseModel], prefix: str, defaults: BaseModel, later: dict[str, dict[str, str]]) -> str:
    """The keys of one section."""
    schemas = dict(properties())
    rows = []
    for name, field in kind.model_fields.items():
        key = f"{prefix}.{name}"
        not_yet = {JINJA if value == YOURS else f"`{value}`" for value in later.get(key, {})}
        offered = [words for words in kinds(schemas[key]) if words not in not_yet]
        values = listed(offered) + (" ([not all yet](#not-in-this-version))" if not_yet else "")
        default = "required" if field.is_required() else shown_default(getattr(defaults, name))
        rows.append((f"`{name}`", values, default, " ".join((field.description or "").split())))
    return table(("key", "value", "default", "meaning"), rows)


def refusal_rows(later: dict[str, dict[str, str]]) -> list[tuple[str, str, str]]:
    """One row for the keys and values that are refused in the same words."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for key, values in later.items():
        for value, words in values.items():
            said = re.sub(rf"(the (?:format|template)) {re.escape(value)}| \({re.escape(value)}\)", r"\1", words)
            keys, of_them = groups.setdefault(said, ([], []))
            keys += [here(key)] if here(key) not in keys else []
            of_them += [f"`{value}`"] if f"`{value}`" not in of_them else []
    return [(", ".join(keys), ", ".join(of_them), said) for said, (keys, of_them) in groups.items()]


def here(key: str) -> str:
    """A key with a link to where it is explained."""
    anchor = SOURCE_ANCHOR if key.count(".") == 2 else key.partition(".")[0]
    return f"[`{key}`](#{anchor})" if key else ""


def elsewhere_rows() -> list[tuple[str, str, str]]:
    """Other programs' names, those with the same answer together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, there in KEYS.items():
        groups.setdefault((there.key, there.note), []).append(f"`{name}`")
    return [(", ".join(names), here(key), note) for (key, note), names in groups.items()]


def value_rows() -> list[tuple[str, str, str]]:
    """Other programs' values, those with the same answer together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key, answers in VALUES.items():
        for value, words in answers.items():
            groups.setdefault((key, words), []).append(f"`{value}`")
    return [(here(key), ", ".join(values), words) for (key, words), values in groups.items()]


def automatic() -> list[tuple[str, str]]:
    """The keys that take `auto`, each with the part of its docstring that says what it does."""
    rows = []
    for key, schema in properties():
        if "auto" in choices(schema):
            parts = re.split(r"(?<=[.;:])\s", " ".join(schema["description"].split()))
            rows += [(here(key), " ".join(part for part in parts if "auto" in part) or "As for data.template.")]
    return rows


def recipe_page() -> str:
    """The whole page."""
    defaults, later = smallest(), refused()
    required = [
        f"`{section}.{name}`"
        for section, field in Recipe.model_fields.items()
        for name, inner in getattr(field.annotation, "model_fields", {}).items()
        if inner.is_required()
    ]
    example = "tune train recipe.yaml " + " ".join(f"'{word}'" if " " in word else word for word in EXAMPLE)
    page = ["# The recipe", Recipe.__doc__ or "", INTRO.format(required=" and ".join(required))]
    page += ["## Changes on the command line", OVERRIDES.format(example=example), "## auto", AUTO]
    page.append(table(("key", "meaning"), automatic()))
    for name, field in Recipe.model_fields.items():
        section = getattr(defaults, name)
        if not isinstance(section, BaseModel):
            schema = json_schema()["properties"][name]
            row = (f"`{name}`", listed(kinds(schema)), shown_default(section), str(field.description))
            page += [f"## {name}", table(("key", "value", "default", "meaning"), [row])]
            continue
        page += [f"## {name}", str(field.description), section_table(type(section), name, section, later)]
        if name == "data":
            page += ["## An item of data.train", f"{Source.__doc__} A list at `data.eval` has the same items."]
            page.append(section_table(Source, "data.train", defaults.data.train[0], later))
    if later:
        page += ["## Not in this version", LATER, table(("key", "value", "answer"), refusal_rows(later))]
    page += ["## Names from elsewhere", ELSEWHERE, table(("elsewhere", "here", "remark"), elsewhere_rows())]
    page += [ELSEWHERE_VALUES, table(("key", "elsewhere", "answer"), value_rows())]
    return "\n\n".join(page) + "\n"
