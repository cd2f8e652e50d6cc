"""YAML, a mapping or command-line overrides to plain values, each with the place it was written.

Every scalar but null stays text: the key it stands under decides what it means. So a commit `0123456` is not read in
octal, a run's name `1.10` keeps its zero, and `no` is a word. Nothing is constructed from tags, and aliases are
counted each time they are used, so that a short file cannot become a large recipe.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tune.errors import RecipeError
from tune.secrets import redact

Key = tuple[str | int, ...]
MAX_BYTES = 256 * 1024
MAX_VALUES = 10_000
MAX_DEPTH = 32
MAX_PROBLEMS = 50
HALF_A_CHARACTER = "holds half a surrogate pair, which is no character"

_SECRET = re.compile(
    r"(^|[._-])(token|secret|passw(or)?d|passphrase|credentials?|auth|pat|\w*key)($|[._-])", re.IGNORECASE
)


class Place(NamedTuple):
    """Where something was written: `where` for the reader, `order` to sort by, `key` if `where` names it already."""

    where: str
    order: int
    key: Key | None = None


class Written(NamedTuple):
    """Plain values, the place of each key, and what is wrong with the writing itself."""

    values: dict[str, Any]
    places: dict[Key, Place]
    problems: list[tuple[int, str]]

    def place(self, key: Key) -> Place:
        """The place of `key`; else of what was written inside it; else of the nearest thing around it."""
        inside = [place for other, place in self.places.items() if other[: len(key)] == key]
        if key not in self.places and inside:
            return min(inside, key=lambda place: place.order)
        while key not in self.places:
            key = key[:-1]
        return self.places[key]


class _TextLoader(yaml.SafeLoader):
    """PyYAML's safe loader that guesses no types."""


_TextLoader.yaml_implicit_resolvers = {}
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<\Z"), ["<"])

_TAGS = {
    yaml.ScalarNode: ("tag:yaml.org,2002:str", "tag:yaml.org,2002:null"),
    yaml.SequenceNode: ("tag:yaml.org,2002:seq",),
    yaml.MappingNode: ("tag:yaml.org,2002:map",),
}


class _NodeReader:
    """Turns PyYAML nodes into values, noting lines and collecting problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[Key, Place] = {}
        self.problems: list[tuple[int, str]] = []
        self.count = 0

    def complain(self, node: yaml.Node, words: str) -> None:
        line = node.start_mark.line + 1
        if len(self.problems) == MAX_PROBLEMS:
            told = [problem for _, problem in self.problems]
            raise RecipeError([*told, f"{self.name}:{line}: more is wrong from here on. Is this a recipe?"])
        self.problems.append((line, f"{self.name}:{line}: {words}"))

    def value(self, node: yaml.Node, key: Key, around: tuple[int, ...] = ()) -> Any:
        self.count += 1
        line = node.start_mark.line + 1
        if self.count > MAX_VALUES:
            raise RecipeError(f"{self.name}:{line}: holds more than {MAX_VALUES} values. Is this a recipe?")
        if id(node) in around or len(around) >= MAX_DEPTH:
            raise RecipeError(f"{self.name}:{line}: is nested in itself or too deeply. A recipe has a few levels.")
        # A key's own line is noted by its mapping; list items are noted here.
        self.places.setdefault(key, Place(f"{self.name}:{line}", line))
        if not isinstance(node.tag, str) or node.tag not in _TAGS.get(type(node), ()):
            tag = shown(str(node.tag).replace("tag:yaml.org,2002:", "!!"))
            # As with an alias: what is no word may be the beginning of a password that nobody quoted.
            tag = tag if re.fullmatch(r"!+[\w/.:-]*", tag) and not re.search(r"\d", tag) else "!..."
            self.complain(node, f"a YAML tag has no meaning in a recipe ({tag}). Remove it.")
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, key, (*around, id(node)))
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*key, index), (*around, id(node))) for index, item in enumerate(node.value)]
        return None if node.tag.endswith(":null") else node.value

    def mapping(self, node: yaml.MappingNode, key: Key, around: tuple[int, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            if not isinstance(name_node, yaml.ScalarNode) or not name_node.value:
                self.complain(name_node, "a key must be a plain word. Write `key: value`.")
                continue
            if name_node.tag.endswith(":merge"):
                self.complain(name_node, "a recipe has no merge keys (<<). Write the keys out.")
                continue
            name = name_node.value
            if not _is_unicode(name):
                self.complain(name_node, f"a key {HALF_A_CHARACTER} ({shown(name)}). Write it without.")
                continue
            path = (*key, name)
            if name in values:
                self.complain(
                    name_node, f"{dotted(path)}: is set twice, first at {self.places[path].where}. Remove one."
                )
                continue
            line = name_node.start_mark.line + 1
            self.places[path] = Place(f"{self.name}:{line}", line)
            values[name] = self.value(value_node, path, around)
        return values


def dotted(key: Key) -> str:
    """`data.train[0].path` for ("data", "train", 0, "path")."""
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return shown(text, 120)


def shown(value: Any, limit: int = 60) -> str:
    """A value as a message shows it: one short line."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple | set):
        return "a list"
    # Before it is cut: half a secret would not be known as one.
    text = " ".join("".join(c if c.isprintable() else " " for c in redact(str(value))).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."


def read_file(path: Path) -> Written:
    """Read a recipe file that exists. Raises RecipeError where nothing can be read from it."""
    name = shown(path, 200)
    try:
        # A pipe would block an ordinary open until someone writes to it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise RecipeError(f"{name}: is a pipe or a device. Write the recipe into a file first.")
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read ({error.strerror}). Check its permissions.") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{name}: is larger than {MAX_BYTES // 1024} KiB. Is this a recipe?")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{name}:{line}: is not text in UTF-8. A recipe is a YAML file.") from None
    return read_text(text, name)


def read_text(text: str, name: str) -> Written:
    """Read a recipe from text that messages call `name`."""
    reader = _NodeReader(name)
    root = _compose(text, name)
    if root is None or (isinstance(root, yaml.ScalarNode) and root.tag.endswith(":null")):
        raise RecipeError(f"{name}:1: is empty. A recipe needs model.base and data.train; `tune recipes` shows some.")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        line = root.start_mark.line + 1
        raise RecipeError(f"{name}:{line}: is {kind}, not a recipe. Write sections such as `model:` and `data:`.")
    values = reader.value(root, ())
    return Written(values or {}, reader.places, reader.problems)


def _compose(text: str, name: str) -> yaml.Node | None:
    # Each way that PyYAML can fail on a user's text ends here; its own message would quote lines of the file.
    try:
        return yaml.compose(text, Loader=_TextLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        remedy = "Indent with spaces, not tabs." if "\\t" in str(error.problem) else "Check indentation and quotes."
        # What is no word may be the beginning of a password that nobody quoted.
        problem = re.sub(r"(alias|anchor|handle) '[^']*\d.*?'", r"\1", str(error.problem))
        if problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        words = f"is not valid YAML (column {column}: {shown(problem, 120)}). {remedy}"
        raise RecipeError(f"{name}:{line}: {words}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise RecipeError(
            f"{name}:{line}: holds a character that is not text (#x{ord(text[error.position]):04x}). Remove it."
        ) from None
    except RecursionError:
        raise RecipeError(f"{name}: is nested too deeply. A recipe has a few levels.") from None
    except (ValueError, OverflowError):
        # PyYAML turns an escape such as \UFFFFFFFF into a character without asking whether there is one.
        raise RecipeError(f"{name}: holds an escape that is no character. Write the character itself.") from None


def read_mapping(recipe: Mapping[str, Any]) -> Written:
    """Read a recipe written in Python."""
    return Written(_plain(recipe, 0), {(): Place("recipe", 0)}, [])


def _plain(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise RecipeError("recipe: is nested in itself or too deeply. A recipe has a few levels.")
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise RecipeError(f"recipe: a key must be text ({shown(name)}). Write it in quotes.")
            if not _is_unicode(name):
                raise RecipeError(f"recipe: a key {HALF_A_CHARACTER} ({shown(name)}). Write it without.")
        return {name: _plain(item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def apply_overrides(written: Written, overrides: Sequence[str]) -> None:
    """Set `section.key=VALUE` for each override, in order; VALUE is YAML. Problems are added to `written`."""
    last = max((place.order for place in written.places.values()), default=0)
    for order, override in enumerate(overrides, start=last + 1):
        name, equals, text = override.partition("=")
        where = f"{shown(f'{name}=...' if _SECRET.search(name) else override)} (command line)"
        parts = re.sub(r"\[(\d+)\]", r".\1", name.strip()).split(".")
        if not equals or not all(parts):
            written.problems.append(
                (order, f"{where}: is not an override. Write it as key=value, such as train.seed=1.")
            )
            continue
        key, words = _set(written.values, _into_sources(written.values, parts))
        if words is None:
            words = _set_value(written, key, text, Place(where, order, key))
        if words is not None:
            written.problems.append((order, f"{where}: {words}"))


def _into_sources(values: dict[str, Any], parts: list[str]) -> list[str]:
    """Make way for `data.train.0.limit` and its like: a path becomes the source that it is short for.

    A single source counts as a list of one; the parts that lead to the key are returned.
    """
    data = values.get("data")
    if len(parts) < 3 or parts[0] != "data" or parts[1] not in ("train", "eval") or not isinstance(data, dict):
        return parts
    listed = data.get(parts[1])
    if _is_path(listed):
        data[parts[1]] = listed = {"path": listed}
    index = int(parts[2]) if parts[2].isascii() and parts[2].isdecimal() else None
    if isinstance(listed, dict) and index == 0:
        return [*parts[:2], *parts[3:]]
    if isinstance(listed, dict) and index is not None:
        data[parts[1]] = listed = [listed]
    if isinstance(listed, list) and len(parts) > 3 and index is not None and index < len(listed):
        listed[index] = {"path": listed[index]} if _is_path(listed[index]) else listed[index]
    return parts


def _is_path(value: Any) -> bool:
    """Whether a value of data.train or data.eval is neither a fraction nor none."""
    return isinstance(value, str) and not re.fullmatch(r"[-+.\d]+(e[-+]?\d+)?|none|true|false|", value, re.IGNORECASE)


def _set(values: dict[str, Any], parts: list[str]) -> tuple[Key, str | None]:
    """Walk to the container of the last part, making sections on the way; return the key, or what stands in the way."""
    inside: Any = values
    key: Key = ()
    for part in parts:
        step: str | int = int(part) if isinstance(inside, list) and part.isascii() and part.isdecimal() else part
        if isinstance(inside, list) and (isinstance(step, str) or step >= len(inside)):
            return key, f"{dotted(key)} has no item {shown(part)}. It is a list of {len(inside)}, counted from 0."
        if not isinstance(inside, dict | list):
            return key, f"{dotted(key)} is a value and has no keys ({shown(inside)}). Set it as a whole."
        key = (*key, step)
        if len(key) < len(parts):
            if isinstance(inside, dict) and inside.get(part) is None:
                inside[part] = {}
            inside = inside[step]
    return key, None


def _set_value(written: Written, key: Key, text: str, place: Place) -> str | None:
    reader = _NodeReader("value")
    try:
        node = _compose(text, "value")
        value = None if node is None else reader.value(node, ())
    except RecipeError as error:
        return "the value " + error.problems[0].partition(": ")[2]
    if reader.problems:
        return "the value: " + reader.problems[0][1].partition(": ")[2]
    inside: Any = written.values
    for part in key[:-1]:
        inside = inside[part]
    inside[key[-1]] = value
    for old in [old for old in written.places if old[: len(key)] == key]:
        del written.places[old]
    written.places[key] = place
    return None
