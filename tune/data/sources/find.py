"""Which files a local path means: one file, the files of a folder, or those that a pattern matches."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Collection, Iterable
from typing import NamedTuple

from tune.data.sources.files import PACKED, File
from tune.data.sources.patterns import MOST, TooManyError, expanded
from tune.data.sources.rows import printable
from tune.errors import DataError, did_you_mean

NOT_READ = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "Save the sheet as .csv, in UTF-8"),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4"), "Unpack it, or pack with .gz or .zst"
    ),
    **dict.fromkeys(
        (".txt", ".md", ".html"), 'Rows have columns: save each text as a line {"text": "..."} of a .jsonl file'
    ),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".npy"),
        "Such a file can run code when it is opened, so it never is. Save the rows as .jsonl",
    ),
    **dict.fromkeys((".yaml", ".yml", ".xml"), "Save the rows as .jsonl, one object a line"),
    **dict.fromkeys((".db", ".sqlite", ".sqlite3"), "Export the table as .csv"),
    ".feather": "If it is Feather version 2, which is Arrow, let its name end in .arrow",
}
"""Endings of files that are not read, and what to do instead."""


class Ending(NamedTuple):
    """What a file's name says: its kind, such as ".jsonl", and how it is packed, ".gz", ".zst" or ""."""

    kind: str
    packing: str


def ending_of(name: str) -> Ending:
    """What `name` ends in, in lower case; a part is "" where the name does not say it."""
    stem, last = os.path.splitext(name.lower())
    return Ending(os.path.splitext(stem)[1], last) if last in PACKED else Ending(last, "")


def find_files(path: str, kinds: Collection[str], named: frozenset[str]) -> list[File]:
    """The files that `path` means, in order.

    Args:
        path: a file, a folder, or a pattern with `*`, `?`, `[...]` or `**`.
        kinds: the endings that are read.
        named: the columns that the recipe asks for by name.

    Raises:
        DataError: nothing is there, or it is of no kind that is read, or it is not permitted.
    """
    _refuse_address(path)
    expanded = os.path.expanduser(path)
    mode = _mode(expanded, path)
    if mode is not None and stat.S_ISDIR(mode):
        return _in_folder(expanded, path, kinds, named)
    if mode is None and glob.has_magic(path):
        return _matching(expanded, path, kinds, named)
    if mode is None and not os.path.islink(expanded):
        raise DataError(_missing(expanded, path))
    ending = ending_of(path)
    if ending.kind not in kinds and (mode is None or stat.S_ISREG(mode)):
        raise DataError(f"{path}: {_not_read(ending, kinds)}")
    return [File(expanded, printable(path), *ending, named)]


def _in_folder(folder: str, path: str, kinds: Collection[str], named: frozenset[str]) -> list[File]:
    """A folder's own files of the kinds that are read, by name; hidden ones and subfolders are left out."""
    names, folders = _listing(folder, path)
    if "dataset_dict.json" in names:
        raise DataError(
            f"{path}: is a folder of several splits, saved by datasets. Name one of them{_such_as(path, folders)}."
        )
    if "dataset_info.json" in names and "state.json" in names:
        # As `datasets` saves one split: the .json files beside the rows describe them.
        names = [name for name in names if ending_of(name).kind == ".arrow"]
    for mark, what in (("adapter_config.json", "an adapter"), ("config.json", "a model"), ("coverage.json", "a run")):
        if mark in names:
            raise DataError(f"{path}: is a folder that holds {what} ({mark}), not rows. Name a data file.")
    readable = [name for name in names if ending_of(name).kind in kinds]
    if not readable:
        raise DataError(f"{path}: is a folder, and {_nothing_in(folder, path, names, folders, kinds)}")
    return _files(
        [os.path.join(folder, name) for name in readable], [f"{path.rstrip('/')}/{n}" for n in readable], path, named
    )


def _nothing_in(folder: str, path: str, names: list[str], folders: list[str], kinds: Collection[str]) -> str:
    """Why a folder gives no file, and what to name instead."""
    for inner in folders:
        try:
            within = _listing(os.path.join(folder, inner), path)[0]
        except DataError:  # one that cannot be looked into is none to propose
            continue
        if found := [ending_of(name) for name in within if ending_of(name).kind in kinds]:
            pattern = f"{path.rstrip('/')}/**/*{found[0].kind}{found[0].packing}"
            return f"its rows are further down. Name {path.rstrip('/')}/{inner}, or write {pattern} for all below."
    if not names:
        return "it is empty. Name another."
    return f"none of its files ({_listed(names)}) is read: {_not_read(ending_of(names[0]), kinds)}"


def _matching(pattern: str, path: str, kinds: Collection[str], named: frozenset[str]) -> list[File]:
    """The files that a pattern matches, by name; hidden ones, folders and kinds that are not read are left out."""
    try:
        matches = sorted(match for match in expanded(pattern) if not os.path.isdir(match))
    except TooManyError:
        raise DataError(
            f"{path}: looks at more than {MOST:,} files and folders. Begin the pattern with the folder that holds the "
            "rows."
        ) from None
    readable = [match for match in matches if ending_of(match).kind in kinds]
    if readable:
        return _files(readable, readable, path, named)
    if matches:
        raise DataError(f"{path}: matches only {_listed(matches)}. {_not_read(ending_of(matches[0]), kinds)}")
    parts = pattern.split("/")
    fixed = "/".join(parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
    folder = fixed or ("/" if pattern.startswith("/") else ".")
    if not os.path.isdir(folder):
        raise DataError(f"{path}: matches no file: {_missing(folder, folder)}")
    names = [name for name in _listing(folder, folder)[0] if ending_of(name).kind in kinds]
    near = did_you_mean(parts[-1], names)
    held = f" {folder} holds {_listed(names)}." if names else ""
    raise DataError(f"{path}: matches no file. Patterns start at the working directory.{held}{near}")


def _files(paths: list[str], shown: list[str], path: str, named: frozenset[str]) -> list[File]:
    unpacked = {found: name for found, name in zip(paths, shown, strict=True) if not ending_of(found).packing}
    for found, name in zip(paths, shown, strict=True):
        ending = ending_of(found)
        if ending.packing and (twin := unpacked.get(found[: -len(ending.packing)])):
            raise DataError(f"{path}: holds {twin} and {name}: most likely the same rows twice. Remove or name one.")
    return [File(p, printable(s), *ending_of(p), named) for p, s in zip(paths, shown, strict=True)]


def _mode(expanded: str, path: str) -> int | None:
    try:
        return os.stat(expanded).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be looked at ({error.strerror}). Check the path and its permissions."
        ) from None
    except ValueError as error:  # a zero character, or half a surrogate pair
        raise DataError(f"{path!r}: is no path ({error}). Write it again.") from None


def _listing(folder: str, path: str) -> tuple[list[str], list[str]]:
    """The names of a folder's files and of its subfolders, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{path}: cannot be listed ({error.strerror}). Check the folder's permissions.") from None
    return sorted(name for name, is_dir in found if not is_dir), sorted(name for name, is_dir in found if is_dir)


def _missing(expanded: str, path: str) -> str:
    folder, name = os.path.split(expanded.rstrip("/"))
    folder = folder or "."
    names: list[str] = []
    if os.path.isdir(folder):
        try:
            names = sorted(os.listdir(folder))
        except OSError:  # the message is about the file; a folder that hides its names only costs the proposal
            names = []
    missing = "" if os.path.isdir(folder) else f" There is no folder {folder!r} either."
    what = "file" if os.path.splitext(name)[1] else "file or folder"
    hub = "" if "/" in path or what == "file" else " A data set on the Hub is written OWNER/NAME."
    near = did_you_mean(name, names)
    return f"{path}: there is no such {what}. Paths start at the working directory.{missing}{hub}{near}"


def _refuse_address(path: str) -> None:
    scheme, found, rest = path.partition("://")
    if not found:
        return
    if rest.startswith("huggingface.co/datasets/"):
        name = "/".join(rest.split("/")[2:4])
        raise DataError(f"{path}: is an address. Write the data set's id: {name}.")
    raise DataError(f"{path}: is an address ({scheme}), and rows are read from files. Fetch it, and name the file.")


def _not_read(ending: Ending, kinds: Collection[str]) -> str:
    """A sentence or two on an ending that is not read."""
    kind, packing = ending
    if not kind and packing:
        return f"its name does not say what is packed. Let it end in one such as .jsonl{packing}."
    remedy = NOT_READ.get(kind)
    remedy = (
        f"{remedy}."
        if remedy
        else f"Data files are {', '.join(kinds)}, each also .gz or .zst.{did_you_mean(kind, kinds)}"
    )
    return f"a {f'{kind} file' if kind else 'file without an ending'} is not read. {remedy}"


def _such_as(path: str, names: list[str]) -> str:
    return f", such as {path.rstrip('/')}/{names[0]}" if names else ""


def _listed(names: Iterable[str]) -> str:
    first = [printable(name) for name in names]
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")
