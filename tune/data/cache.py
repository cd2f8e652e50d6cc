"""Encoded sources on the disk, so that a second start does not tokenise again.

An entry is a folder named by a digest of all that its tokens depend on: the source's contents, how its rows are read,
the tokenizer, the template, the options that shape an example, and this program. So an entry is never stale; it is
found or it is not. It is written under another name and then renamed, hence whole or absent, and one that was damaged
since is written again. Processes that want the same entry wait for the first one to write it.

A cache that cannot be written is no error: the examples then lie in a temporary folder that this process alone sees.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

from tune.data.examples import Stored, Where
from tune.data.facts import Facts
from tune.data.store import FACTS, DamagedError, UnwritableError, Writer, read_stored, writing
from tune.data.templates.segment import Template
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_DAYS = 30
"""An entry that no run has used for so long is removed when a new one is written."""
_UNFINISHED = ".writing-"
_DAY = 24 * 3600

Kept = tuple[Facts, Stored]
Fill = Callable[[Writer], Facts]
"""Writes a source's examples and finishes the writer; what it returns was written with them."""


def cache_folder() -> Path:
    """`$TUNE_CACHE`, else `$XDG_CACHE_HOME/tune`, else `~/.cache/tune`."""
    if own := os.environ.get("TUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tune"


def words_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 of all that decides how a tokenizer reads text and what a template may ask it for."""
    backend = tokenizer.backend_tokenizer.to_str()
    # Truncation and padding come first; they change with every use of the tokenizer, and are switched off here.
    _, name, rest = backend.partition('"added_tokens":')
    described = {"special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()}}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    digest.update((name + rest or backend).encode())
    return digest.hexdigest()


def template_words(template: Template) -> dict[str, str]:
    """All that decides what a bound template writes, beside the tokenizer it is bound to."""
    told = {"kind": type(template).__qualname__, "bound": repr(template), "jinja": template.jinja}
    # Such a template writes another prompt every day.
    return {**told, "day": time.strftime("%Y-%m-%d")} if "strftime" in template.jinja else told


def key_of(parts: Mapping[str, Any]) -> str:
    """The name of an entry: a SHA-256 over what it depends on, the program and its libraries included."""
    return hashlib.sha256(json.dumps({**parts, **_program()}, sort_keys=True).encode()).hexdigest()


@cache
def _program() -> dict[str, str]:
    told = {"code": code_digest(Path(__file__).parent)}
    for name in ("tune-peft", "tokenizers", "transformers", "jinja2"):
        with suppress(PackageNotFoundError):  # this program itself may run from a clone
            told[name] = version(name)
    return told


def code_digest(folder: Path) -> str:
    """A SHA-256 over the Python files of a folder and those below it, their names included."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


class Cache:
    """The entries of one cache folder. With `keep` false none is read or written.

    `problem` says why the folder cannot be used, once that is known.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self.folder: Path | None = None
        self.problem: str | None = None
        try:
            self.folder = cache_folder() / "data" if keep else None
        except RuntimeError as error:  # pathlib's, for an account without a home
            self.problem = str(error)

    def find(self, key: str, where: Where) -> Kept | None:
        """The entry of this name; None when there is none or it is damaged."""
        if self.folder is None:
            return None
        path = self.folder / key
        try:
            found = read_stored(path, where)
        except DamagedError:
            return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(path / FACTS)
        return found

    def fill(self, key: str, fill: Fill, where: Where) -> Kept:
        """Write an entry, or an unnamed one where that cannot be, and return it. `fill` may be called twice.

        Raises:
            DataError: there is no room for it anywhere.
        """
        if self.folder is not None:
            try:
                return self._write(self.folder, key, fill, where)
            except UnwritableError as error:
                self.problem = str(error)
                self.folder = None
        return _write_unnamed(fill, where)

    def _write(self, folder: Path, key: str, fill: Fill, where: Where) -> Kept:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{key}.lock"):
            if (found := self.find(key, where)) is not None:
                return found  # another process has just written it
            unfinished = folder / f"{_UNFINISHED}{uuid4().hex}"
            try:
                with writing(folder):
                    unfinished.mkdir()
                with Writer(unfinished) as writer:
                    fill(writer)
                _remove(folder / key)  # a damaged one
                with suppress(OSError):  # where files cannot be locked, another process may have been faster
                    unfinished.rename(folder / key)
                kept = _read_back(unfinished if unfinished.exists() else folder / key, where)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
        _forget(folder)
        return kept


def _write_unnamed(fill: Fill, where: Where) -> Kept:
    try:
        with writing("the temporary folder"):
            folder = Path(tempfile.mkdtemp(prefix="tune-data-"))
        try:
            with Writer(folder) as writer:
                fill(writer)
            return _read_back(folder, where)
        finally:
            # Mapped files stay until the process ends, whatever ends it.
            shutil.rmtree(folder, ignore_errors=True)
    except UnwritableError as error:
        raise DataError(
            f"{error}: there is no place for the encoded examples. Free some, or set TUNE_CACHE or TMPDIR to a folder "
            "with room."
        ) from error


def _read_back(folder: Path, where: Where) -> Kept:
    try:
        return read_stored(folder, where)
    except DamagedError as error:
        raise UnwritableError(f"{error}, just after it was written") from error


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait for whoever writes the same entry; the lock dies with its process."""
    import fcntl

    while True:
        with writing(path.parent):
            file = path.open("w")
        # A file system without locks: two may write the same entry, and the first rename counts.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(path, file):
            break
        file.close()  # whoever had it before has removed it, and the next one already waits at another
    with file:
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _remove(entry: Path) -> None:
    """Remove an entry so that nobody sees half of it."""
    aside = entry.with_name(f"{_UNFINISHED}{uuid4().hex}")
    with suppress(OSError):  # there is none, or somebody else has removed it
        entry.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _forget(folder: Path) -> None:
    """Remove the entries of long ago, and what was never finished. What cannot be removed stays."""
    now = time.time()
    for path in list(folder.iterdir()):
        with suppress(OSError):
            if path.name.startswith(_UNFINISHED):
                if now - path.stat().st_mtime > _DAY:
                    shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".lock":
                if now - path.stat().st_mtime > _DAY:
                    path.unlink()
            elif now - (path / FACTS).stat().st_mtime > KEPT_DAYS * _DAY:
                _remove(path)
