"""Files that somebody else may have written, read with care.

A name can be a link to a private file, a pipe that never ends, a device, or a file larger than the memory; JSON can
be nested until the parser gives up, say one key twice, or hold numbers that are none. What is refused here is refused
before anything of it is used, as a `ValueError` in plain words, which whoever reads the file puts its name before.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

_DEEPEST = 64
"""Levels of lists and objects."""
_DIGITS = 100
"""Of a whole number; a tokenizer without a longest length says 1 and thirty digits."""
_LONGEST_LINE = 4 * 2**20


def open_plain(path: str | os.PathLike[str], links: bool = False) -> BufferedReader:
    """Open a file for reading that is one: no folder, pipe, socket or device.

    Args:
        path: the file.
        links: whether the name may be a link; where one may lead is `followed`'s to say.

    Raises:
        ValueError: it is something else; in words that go on from the file's name.
        OSError: it cannot be opened.
    """
    # Without blocking, since a pipe that nobody writes to would be waited for.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError("is a link, and has to be the file itself") from error
        if error.errno == errno.ENXIO:
            raise ValueError("is no plain file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("is no plain file")
    return os.fdopen(descriptor, "rb")


def read_plain(path: str | os.PathLike[str], most: int, links: bool = False) -> bytes:
    """Return the content of a plain file of at most `most` bytes.

    Raises:
        ValueError: it is something else, or larger.
        OSError: it cannot be read.
    """
    with open_plain(path, links) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"is longer than the {most / 2**20:,.3g} MiB that such a file may have")
    return content


def read_object(path: str | os.PathLike[str], most: int = 16 * 2**20, links: bool = False) -> dict[str, Any]:
    """Return the JSON object in a plain file.

    Raises:
        ValueError: as `read_plain`, or it holds something else.
        OSError: it cannot be read.
    """
    found = parse_json(read_plain(path, most, links))
    if not isinstance(found, dict):
        raise ValueError("holds no JSON object")
    return found


def parse_json(content: bytes) -> Any:
    """Return what strict JSON in UTF-8 says: no key twice, no NaN, no number beyond a float, a few levels deep.

    Raises:
        ValueError: says what it is instead.
    """
    if content.startswith(b"\xef\xbb\xbf"):
        raise ValueError("begins with a byte order mark, which JSON has not")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not text in UTF-8 (byte {error.start:,})") from None
    try:
        found = json.loads(
            text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        words = f"{error.msg}, line {error.lineno} column {error.colno}" if text.strip() else "it is empty"
        raise ValueError(f"is not valid JSON ({words})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    _refuse_depth(found)
    return found


def objects_in(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a plain file, one a line, until a line is something else: a killed process left half.

    Raises:
        ValueError: it is no plain file.
        OSError: it cannot be read.
    """
    with open_plain(path) as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                found = parse_json(line)
            except ValueError:
                return
            if not isinstance(found, dict):
                return
            yield found


def followed(path: Path) -> Path:
    """Return where a file lies whose name may be a link.

    A link may lead to a file of its own folder, and in the Hub's cache, whose snapshots are made of links, to the
    repository's blobs.

    Raises:
        ValueError: it leads elsewhere.
        OSError: it leads nowhere.
    """
    real, folder = path.resolve(strict=True), path.parent.resolve(strict=True)
    places = [folder, *(near.parent.parent / "blobs" for near in (folder, *folder.parents) if _is_snapshot(near))]
    if not any(real.is_relative_to(place) for place in places):
        raise ValueError("is a link out of its folder. Put the file itself there")
    return real


def _is_snapshot(folder: Path) -> bool:
    return folder.parent.name == "snapshots"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"has the key {name[:60]!r} twice")
        found[name] = value
    return found


def _no_number(word: str) -> Any:
    raise ValueError(f"holds {word}, which is no number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"holds a number beyond every float ({digits[:40]})")
    return value


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"holds a number of {len(digits):,} digits")
    return int(digits)


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise ValueError("is nested too deeply")


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, dict | list)]
