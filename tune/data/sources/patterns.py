"""What a pattern of names matches, as `glob` finds it, but for two things: it gives up, and never runs in circles.

`/**/*.jsonl` would walk through a whole machine, and in /proc without an end, since its folders hold links to the root.
Here a walk counts what it sees, and `**` goes through folders alone, not through links to some.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator

MOST = 1_000_000
"""Files and folders that are looked at for one pattern."""


class TooManyError(Exception):
    """A pattern looks at more than `MOST`."""


def expanded(pattern: str) -> list[str]:
    """The paths that match, each once. Names that begin with a dot match only what begins with one.

    Args:
        pattern: with `*`, `?` and `[...]`, which match within a name, and `**`, which matches any folders or none.

    Raises:
        TooManyError: too much would have to be looked at.
    """
    rooted = pattern.startswith("/")
    parts = [part for part in pattern.split("/") if part]
    found = dict.fromkeys(_Walk().matches("/" if rooted else "", parts))
    return [path for path in found if os.path.isdir(path)] if pattern.endswith("/") else list(found)


class _Walk:
    def __init__(self) -> None:
        self._seen = 0

    def matches(self, folder: str, parts: list[str]) -> Iterator[str]:
        """What matches `parts` below a folder, which ends in a slash or is empty."""
        part, rest = parts[0], parts[1:]
        if part == "**":
            yield from self._below(folder, rest)
        elif not glob.has_magic(part):
            path = folder + part
            if not rest and os.path.lexists(path):
                yield path
            elif rest and os.path.isdir(path):
                yield from self.matches(f"{path}/", rest)
        else:
            for entry in self._entries(folder):
                if (part.startswith(".") or not entry.name.startswith(".")) and fnmatch.fnmatchcase(entry.name, part):
                    if not rest:
                        yield folder + entry.name
                    elif _is_folder(entry, links=True):
                        yield from self.matches(f"{folder}{entry.name}/", rest)

    def _below(self, folder: str, rest: list[str]) -> Iterator[str]:
        """What matches `rest` in a folder or in any folder below it."""
        waiting = [folder]
        while waiting:
            inner = waiting.pop()
            if rest:
                yield from self.matches(inner, rest)
            for entry in self._entries(inner):
                if entry.name.startswith("."):
                    continue
                if not rest:
                    yield inner + entry.name
                if _is_folder(entry, links=False):
                    waiting.append(f"{inner}{entry.name}/")

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder or ".") as entries:
                for entry in entries:
                    self._seen += 1
                    if self._seen > MOST:
                        raise TooManyError
                    yield entry
        except OSError:  # what cannot be listed matches nothing, as for a shell
            return


def _is_folder(entry: os.DirEntry[str], links: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=links)
    except OSError:  # a link into what may not be looked at
        return False
