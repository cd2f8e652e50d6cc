"""Where rows come from: a local .json or .jsonl file, or a data set on the Hugging Face Hub.

Files are read here rather than through `datasets`, since each row must know its line: an error in the
data is only useful when it says where. A row that cannot be read is not raised but returned beside the
good ones, so that `data.on_bad` is decided in one place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.data.formats import columns_seen
from tune.data.hub import explain, one_line, refused_at_once
from tune.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from tune.recipe.schema import Source

EXTENSIONS = (".json", ".jsonl")
# Endings that say "a file" even where there is none, so that a typing error is not looked up on the hub.
_FILE_ENDINGS = {*EXTENSIONS, ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst", ".zip", ".xlsx", ".ndjson"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a source, and where it stands: `file:line`, or `owner/name[split][index]`."""

    value: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"

    @property
    def position(self) -> int:
        """The line or index that `where` ends with."""
        return int(re.findall(r"\d+", self.where)[-1])


@dataclass(slots=True)
class Rows:
    """What a source held, in its order."""

    good: list[Row] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.good) + len(self.bad)

    def add(self, value: object, where: str) -> None:
        """Take a parsed value as a row, a bad one when it is no object."""
        if isinstance(value, dict):
            self.good.append(Row(value, where))
        else:
            self.bad.append(BadRow(where, f"is no object but {_shown(value)}"))


def read_rows(source: Source) -> Rows:
    """The first `source.limit` rows of a source, its columns renamed as `source.columns` says.

    A local path wins over a hub id of the same name.

    Raises:
        DataError: the file or data set is missing, unreadable, empty, or not permitted.
    """
    path = Path(source.path).expanduser()
    if path.exists() or not _is_hub_id(source.path):
        if given := [key for key in ("split", "config", "revision") if getattr(source, key) is not None]:
            raise DataError(f"{source.path}: is a file, and {given[0]}: is for data sets on the hub. Remove it.")
        rows = _read_file(path, source.path, source.limit)
    else:
        rows = _read_hub(source)
    if not len(rows):
        raise DataError(f"{source.path}: holds no rows. Give a file with one object a line, or a list of objects.")
    if source.columns:
        renames = dict(source.columns)
        _check_columns(source, rows)
        rows.good = [Row(_renamed(row.value, renames), row.where) for row in rows.good]
    return rows


def _check_columns(source: Source, rows: Rows) -> None:
    """Refuse a renamed column that no row has: it would be missed later, under a name that the data does not use."""
    for ours, theirs in source.columns.items():
        if rows.good and not any(theirs in row.value for row in rows.good):
            seen = columns_seen([row.value for row in rows.good])
            raise DataError(
                f"{source.path}: columns.{ours}: there is no column {theirs!r}. "
                f"It has: {', '.join(seen) or 'none'}.{did_you_mean(theirs, seen)}"
            )


def _is_hub_id(path: str) -> bool:
    return bool(_HUB_ID.fullmatch(path)) and Path(path).suffix.lower() not in _FILE_ENDINGS


def _renamed(row: dict[str, Any], renames: dict[str, str]) -> dict[str, Any]:
    taken = set(renames.values())
    renamed = {name: value for name, value in row.items() if name not in taken and name not in renames}
    renamed.update((ours, row[theirs]) for ours, theirs in renames.items() if theirs in row)
    return renamed


def _read_file(path: Path, shown: str, limit: int | None) -> Rows:
    _check_file(path, shown)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown}: cannot be read ({error.strerror}). Check the file's permissions.") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{shown}:{line}: is not UTF-8 (byte 0x{content[error.start]:02x}). Save the file as UTF-8."
        ) from None
    if not text.strip():
        raise DataError(f"{shown}: is empty. Give a file with one object a line, or a list of objects.")
    if text.lstrip().startswith("["):
        return _read_array(text, shown, limit)
    return _read_lines(text, shown, limit)


def _check_file(path: Path, shown: str) -> None:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in EXTENSIONS)
        found = f"name one of its files, such as {inside[0]!r}" if inside else "it holds no .json or .jsonl file"
        raise DataError(f"{shown}: is a folder; {found}.")
    if not path.exists():
        folder = path.parent
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        near = did_you_mean(path.name, names)
        missing = "" if folder.is_dir() else f" There is no folder {str(folder)!r} either."
        raise DataError(f"{shown}: there is no such file. Paths start at the working directory.{missing}{near}")
    if path.suffix.lower() not in EXTENSIONS:
        raise DataError(
            f"{shown}: a {path.suffix or 'file without an ending'} is not read. "
            "This version reads .json and .jsonl files, and data sets on the hub as owner/name."
        )


def _read_array(text: str, shown: str, limit: int | None) -> Rows:
    """A JSON array's elements one at a time, for the line on which each starts."""
    rows = Rows()
    scan = json.JSONDecoder().raw_decode
    position = _skip_space(text, text.index("[") + 1)
    line, counted = 1, 0
    try:
        while text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            counted = position
            value, position = scan(text, position)
            rows.add(value, f"{shown}:{line}")
            if len(rows) == limit:
                return rows
            position = _skip_space(text, position)
            if text[position : position + 1] == ",":
                position = _skip_space(text, position + 1)
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, position)
        if (rest := _skip_space(text, position + 1)) != len(text):
            raise json.JSONDecodeError("Expecting the end after ']'", text, rest)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{shown}:{error.lineno}: is not valid JSON ({error.msg}, column {error.colno}). Mend the file there."
        ) from None
    except RecursionError:
        raise DataError(f"{shown}:{line}: is nested too deeply to be a row of training data.") from None
    return rows


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _read_lines(text: str, shown: str, limit: int | None) -> Rows:
    """JSON Lines; only a newline ends a line, since U+2028 and its like may stand inside JSON strings."""
    rows = Rows()
    for number, line in _numbered(text):
        if limit is not None and len(rows) >= limit:
            break
        try:
            rows.add(json.loads(line), f"{shown}:{number}")
        except json.JSONDecodeError as error:
            if not len(rows):
                _refuse_one_object(text, shown)
            rows.bad.append(BadRow(f"{shown}:{number}", f"is not valid JSON ({error.msg}, column {error.colno})"))
        except RecursionError:
            rows.bad.append(BadRow(f"{shown}:{number}", "is nested too deeply to be a row of training data"))
    return rows


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if stripped := line.strip(" \t\r"):
            yield number, stripped


def _refuse_one_object(text: str, shown: str) -> None:
    """A file that is one object over several lines is no list of rows: say which key may hold them."""
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return
    lists = [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    hint = f"Its key {lists[0]!r} holds a list: save that list by itself." if lists else "Put it into a list."
    raise DataError(f"{shown}: holds one object, not a list of rows. {hint}")


def _read_hub(source: Source) -> Rows:
    split = source.split or "train"
    dataset = _load_from_hub(source, split)
    if not hasattr(dataset, "select"):
        raise DataError(f"{source.path}: split {split!r} gives no table of rows. Name one split, such as 'train'.")
    if source.limit is not None:
        dataset = dataset.select(range(min(source.limit, len(dataset))))
    rows = Rows()
    for index, value in enumerate(dataset):
        rows.add(dict(value), f"{source.path}[{split}][{index}]")
    return rows


def _load_from_hub(source: Source, split: str) -> Any:
    import datasets
    from datasets.naming import camelcase_to_snakecase

    owner, name = source.path.split("/")
    prepared = Path(datasets.config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"
    refused = None if prepared.is_dir() else refused_at_once(source.path, "data", source.revision)
    if refused is not None:
        raise DataError(refused)
    try:
        return datasets.load_dataset(source.path, name=source.config, split=split, revision=source.revision)
    # Everything below `load_dataset`, from HTTP to Arrow, raises its own kinds; each ends as one clear message.
    except Exception as error:
        raise DataError(_hub_problem(source, split, error)) from error


def _hub_problem(source: Source, split: str, error: Exception) -> str:
    """What went wrong on the hub, in words that say what to do about it."""
    name, said = source.path, one_line(error)
    if "scripts are no longer supported" in said:
        return f"data: {name} is made by a script, which is never run here. Save its rows as .jsonl."
    if "Config name is missing" in said or "BuilderConfig" in said:
        return f"data: config {source.config!r} of {name} does not fit ({said}). Set `config:` of the source."
    if "split" in said.lower():
        return f"data: split {split!r} of {name} does not fit ({said}). Set `split:` of the source."
    if access := explain(error, name, "data", kind="dataset", revision=source.revision):
        return access
    page = f"https://huggingface.co/datasets/{name}"
    return f"data: {name} cannot be loaded from the Hub ({said}). See {page}."


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."
