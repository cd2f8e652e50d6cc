"""What pydantic found, in the words of a recipe: `file:line: key: what is wrong (value). Remedy.`"""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from tune.recipe.elsewhere import look_up, look_up_value
from tune.recipe.read import HALF_A_CHARACTER, MAX_PROBLEMS, Key, Written, dotted, shown
from tune.recipe.schema import Recipe, Source

_MISSING = object()

_LIMITS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}

_TYPES = {
    "int": "must be a whole number",
    "float": "must be a number",
    "finite": "must be a finite number",
    "bool": "must be true or false",
    "string": "must be text",
    "tuple": "must be a list",
    "list": "must be a list",
    "dict": "must be a mapping such as {name: value}",
}


@functools.cache
def schema_keys() -> dict[str, FieldInfo]:
    """Every key of a recipe, dotted, with its field; a source's keys stand under data.train."""
    keys: dict[str, FieldInfo] = {}
    for name, field in Recipe.model_fields.items():
        keys[name] = field
        section = _section_class(field)
        if section is not None:
            keys |= {f"{name}.{key}": inner for key, inner in section.model_fields.items()}
    return keys | {f"data.train.{key}": field for key, field in Source.model_fields.items()}


def _section_class(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def explain(error: ValidationError, written: Written) -> tuple[list[tuple[int, str]], set[str]]:
    """Return a line for each problem with its order, and the `section.key` names that are not to be trusted."""
    lines: list[tuple[int, str]] = []
    suspects: set[str] = set()
    meant: set[Key] = set()
    details = error.errors(include_url=False)
    if (more := len(details) - MAX_PROBLEMS) > 0:
        lines.append((2**62, f"{written.place(()).where}: and {more} more. Mend these first."))
        details = details[:MAX_PROBLEMS]
    for detail in details:
        if detail["type"] == "extra_forbidden":
            key = _written_key(detail, written)
            words, target = _unknown(key)
            meant.add(target)
            lines.append(_line(key, words, written))
    for detail in details:
        key = _written_key(detail, written)
        suspects.add(".".join(str(part) for part in key[:2]))
        if detail["type"] in ("extra_forbidden", "conflicts"):
            continue
        # A missing key that an unknown key was surely meant for is one problem, not two.
        if detail["type"] == "missing" and (key in meant or key[:1] in meant):
            continue
        # pydantic counts only good items: a list of one bad item is not also an empty list.
        if detail["type"] == "too_short" and _value(key, written):
            continue
        line = _line(key, _wrong(detail, key, written), written)
        if line not in lines:
            lines.append(line)
    return lines, suspects


def explain_conflicts(error: ValidationError, written: Written, suspects: set[str]) -> list[tuple[int, str]]:
    """Return a line for each contradiction between keys, leaving out those that rest on a wrong value."""
    lines = []
    for detail in error.errors(include_url=False):
        for conflict in detail.get("ctx", {}).get("conflicts", []):
            if not suspects & {".".join(conflict.key.split(".")[:2]), *conflict.involves}:
                parts = conflict.key.split(".")
                key = tuple(int(part) if part.isdecimal() else part for part in parts)
                lines.append(_line(_clip(key, written), conflict.words, written))
    return lines


def _line(key: Key, words: str, written: Written) -> tuple[int, str]:
    place = written.place(key)
    name = "" if not key or place.key == key else f"{dotted(key)}: "
    return place.order, f"{place.where}: {name}{words}"


def _written_key(detail: ErrorDetails, written: Written) -> Key:
    """The key as the user wrote it: without pydantic's names for alternatives, ending where the writing ends."""
    loc: Key = tuple(detail["loc"])
    if loc[:2] in (("data", "eval"), ("train", "micro_batch_tokens")):
        loc = loc[:2] + loc[3:]
    return _clip(loc, written)


def _clip(loc: Key, written: Written) -> Key:
    value: Any = written.values
    key: Key = ()
    for index, part in enumerate(loc):
        if isinstance(value, dict) and isinstance(part, int):
            continue  # a single source, which the schema made a list of one
        if isinstance(value, dict):
            key, value = (*key, part), value.get(part, _MISSING)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            key, value = (*key, part), value[part]
        elif value is _MISSING and index < 2:
            key = (*key, part)
        else:
            break
    return key


def _value(key: Key, written: Written) -> Any:
    value: Any = written.values
    for part in key:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return _MISSING
    return value


def _field(key: Key) -> FieldInfo | None:
    names = [part for part in key if isinstance(part, str)]
    if names[:2] == ["data", "eval"] and len(names) > 2:
        names[1] = "train"
    keys = schema_keys()
    return keys.get(".".join(names[:3])) or keys.get(".".join(names[:2]))


def _default(field: FieldInfo | None) -> str:
    if field is None or field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _wrong(detail: ErrorDetails, key: Key, written: Written) -> str:
    kind, value, field = detail["type"], _value(key, written), _field(key)
    about = f" {field.description}" if field is not None and field.description else ""
    default = _default(field)
    if kind == "missing":
        return f"is missing.{about}"
    if value is None and kind != "value_error":
        return f"has no value.{about}" + (f" Remove the key for the default ({default})." if default else "")
    if kind in ("model_type", "model_attributes_type"):
        return f"is a section, not a value ({shown(value)}).{_inside(key)}"
    remedy = _nearest(detail, key, value)
    if not remedy:
        remedy = f" The default is {default}." if default and default != "none" else about
    words = _what(detail)
    # A list's own items are named by the words, and so is what they quote; of an empty value there is nothing to show.
    said = isinstance(value, list) or shown(value) == "" or (isinstance(value, str) and repr(value) in words)
    return f"{words}{'' if said else f' ({shown(value)})'}.{remedy}"


def _inside(key: Key) -> str:
    names = [str(part) for part in key if isinstance(part, str)]
    prefix = "data.train." if len(names) > 1 else f"{names[0]}."
    keys = [name.removeprefix(prefix) for name in schema_keys() if name.startswith(prefix)]
    keys = [name for name in keys if "." not in name]
    return f" Put keys under it: {', '.join(keys)}." if keys else ""


def _what(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in _LIMITS:
        name, words = _LIMITS[kind]
        return f"{words} {context[name]:g}" if context[name] < 10**6 else f"{words} {context[name]}"
    if kind == "literal_error":
        *others, last = _choices(detail)
        return f"must be {', '.join(others)} or {last}" if others else f"must be {last}"
    if kind == "value_error":
        return str(context["error"])
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "string_unicode":
        return HALF_A_CHARACTER
    if kind == "int_from_float":
        return "must be a whole number"
    return _TYPES.get(kind.partition("_")[0], detail["msg"][:1].lower() + detail["msg"][1:])


def _choices(detail: ErrorDetails) -> list[str]:
    return re.findall(r"'([^']*)'", str(detail.get("ctx", {}).get("expected", "")))


def _nearest(detail: ErrorDetails, key: Key, value: Any) -> str:
    if key[-1:] == ("path",) and isinstance(value, list):
        return " Write a list of sources, each with one path."
    if detail["type"] == "less_than" and key == ("data", "eval") and str(value).isdecimal():
        return " For a number of rows, write a list such as [{path: FILE, limit: 100}]."
    if not isinstance(value, str):
        return ""
    if not detail["type"].startswith("int") and (number := _as_number(value)):
        return f" Write {number}."
    hint = look_up_value(".".join(part for part in key if isinstance(part, str)), value)
    if hint:
        return f" {hint}"
    near = difflib.get_close_matches(value.lower(), _choices(detail), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _as_number(text: str) -> str:
    """The number that a percentage or a decimal comma stands for, or an empty string."""
    match = re.fullmatch(r"(\d+(?:[.,]\d+)?)\s*(%?)", text.strip())
    if match is None or not (match[2] or "," in match[1]):
        return ""
    number = float(match[1].replace(",", "."))
    return f"{number / 100 if match[2] else number:g}"


def _unknown(key: Key) -> tuple[str, Key]:
    """Words for a key that does not exist, and the key that was meant where that is clear."""
    name = str(key[-1])
    around = [part for part in key[:-1] if isinstance(part, str)]
    prefix = "".join(f"{part}." for part in around)
    if prefix == "data.eval.":
        prefix = "data.train."
    keys = schema_keys()
    siblings = {path.removeprefix(prefix): path for path in keys if path.startswith(prefix)}
    siblings = {short: path for short, path in siblings.items() if "." not in short}
    words = f"is not a key of {dotted(key[:-1]) if len(key) > 1 else 'a recipe'}."
    plain = name.lower().replace("-", "_")
    if plain in siblings:
        return f"{words} Did you mean {plain!r}?", (*key[:-1], plain)
    if prefix == "data.train." and plain == "name":
        return f"{words} A file or a data set's id is path, a data set's configuration is config.", (*key[:-1], "path")
    known = look_up(name)
    # What another section calls by this very name is nearer than what resembles it here.
    same = [path for path in keys if path.rpartition(".")[2] == plain and not path.startswith("data.train.")]
    if same and (known is None or not known.key):
        target = tuple(same[0].split(".")) if len(same) == 1 else ()
        return f"{words} It belongs elsewhere: {' or '.join(sorted(same))}.", target
    if known is not None:
        return f"{words} {known.words}", tuple(known.key.split("."))
    near = difflib.get_close_matches(plain, siblings, n=1)
    if near:
        return f"{words} Did you mean {near[0]!r}?", (*key[:-1], near[0])
    return f"{words} {_anywhere(plain, siblings)}", ()


def _anywhere(name: str, siblings: dict[str, str]) -> str:
    leaves = {path.rpartition(".")[2]: path for path in schema_keys()}
    near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.75)
    if near:
        return f"Did you mean {leaves[near[0]]!r}?"
    return f"Its keys are {', '.join(siblings)}." if siblings else "Remove it."
