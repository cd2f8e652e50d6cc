"""A run's parts lie in its own folder: what is a link, a pipe or a device there is refused before it is used.

A link in a folder that somebody else made would let a verb read, publish, write or remove what it leads to.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO

from tune.errors import RunError


def refuse_foreign_file(path: Path) -> None:
    """Refuse what stands where a run has a file, if it is something else.

    Raises:
        RunError: says what it is.
    """
    _refuse_unless(stat.S_IFREG, path, "file")


def refuse_foreign_folder(path: Path) -> None:
    """Refuse what stands where a run has a folder, if it is something else, and a folder in which a file is a link.

    Raises:
        RunError: names it.
    """
    _refuse_unless(stat.S_IFDIR, path, "folder")
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        if inner.is_symlink():
            raise RunError(_is_a_link(inner, "file"))


def open_lock(path: Path) -> IO[str]:
    """Return a file to lock, made if need be, and never another one that a link leads to.

    Raises:
        RunError: a link or something else stands there.
        OSError: it cannot be made.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        raise RunError(f"{path}: is no plain file, as a lock has to be. Remove it.") from error
    return os.fdopen(descriptor, "a")


def _refuse_unless(kind: int, path: Path, words: str) -> None:
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # not there, or nothing can be: whoever needs it says so
        return
    if stat.S_ISLNK(mode):
        raise RunError(_is_a_link(path, words))
    if stat.S_IFMT(mode) != kind:
        raise RunError(f"{path}: is no {words}. Remove it, or put the run's own back.")


def _is_a_link(path: Path, words: str) -> str:
    return (
        f"{path}: is a link, and what a run reads, writes and removes lies in its own folder. "
        f"Put the {words} itself there."
    )
