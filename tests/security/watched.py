"""Work in a forked child that notes what it does to the machine: what it opens, writes, removes, imports and starts.

Python's own audit events say so (https://docs.python.org/3/library/audit_events.html). Code in C or Rust that opens
a file for itself raises none, so what such code is given has to be watched by what it says or leaves behind.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.training.processes import fork, wait
from tune.errors import TuneError

_NAMES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.symlink": ((1, 2),),
    "os.link": ((1, 3),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
}
"""Which arguments of an event name what is changed, and which the folder that a name is relative to."""
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
_CONFINED = "tune.data.templates.confined"
"""A process of our own that renders templates, and may do nothing else."""
_CONNECTS = ("socket.connect", "socket.getaddrinfo", "urllib.Request")


@dataclass
class Seen:
    """What a child did."""

    code: int = 0
    """What the command line would end with: 0, or the error's exit code; 1 for a traceback."""
    said: str = ""
    """The error's words, or the traceback."""
    seconds: float = 0.0
    grown: int = 0
    """Bytes by which the most memory it held grew."""
    opened: set[str] = field(default_factory=set)
    """Real paths of all that was opened."""
    changed: set[str] = field(default_factory=set)
    """Real paths of all that was opened for writing, made, renamed or removed."""
    imported: set[str] = field(default_factory=set)
    started: list[str] = field(default_factory=list)
    connected: list[str] = field(default_factory=list)

    def assert_inside(self, *places: Path, untouched: Iterable[Path] = ()) -> None:
        """Nothing outside of `places` was changed, nothing was started or asked for, and `untouched` was not opened."""
        roots = [os.path.realpath(place) for place in places]
        outside = {
            path for path in self.changed if not any(path == root or path.startswith(f"{root}/") for root in roots)
        }
        assert not outside, f"changed outside: {sorted(outside)}"
        for path in untouched:
            assert os.path.realpath(path) not in self.opened, f"{path} was opened"
        assert not self.started, self.started
        assert not self.connected, self.connected

    def assert_refused(self, *words: str, seconds: float = 10, grown: int = 2**28) -> None:
        """It ended in one line of ours that holds `words`, soon, and without much memory."""
        assert self.code == 2, self.said
        assert len(self.said.splitlines()) == 1, self.said
        assert len(self.said) < 1000, f"{len(self.said)} characters"
        assert "Traceback" not in self.said
        for word in words:
            assert word in self.said, self.said
        assert self.seconds < seconds, f"{self.seconds:.1f} s"
        assert self.grown < grown, f"{self.grown / 2**20:.0f} MiB"


class _Notes:
    """The audit hook of a child."""

    def __init__(self) -> None:
        self.seen, self.on = Seen(), True

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what a note itself does is no event
        try:
            self._note(event, arguments)
        finally:
            self.on = True

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, str | bytes | os.PathLike):
                # The event comes before the system refuses to follow a link.
                plain = isinstance(flags, int) and flags & os.O_NOFOLLOW
                real = _name(os.fsdecode(path), -1) if plain else os.path.realpath(os.fsdecode(path))
                self.seen.opened.add(real)
                writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
                if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and not _is_harmless(real):
                    self.seen.changed.add(real)
        elif event in _NAMES:
            for place, folder in _NAMES[event]:
                if isinstance(path := arguments[place], str | bytes | os.PathLike):
                    name = _name(os.fsdecode(path), -1 if folder is None else arguments[folder])
                    if not _is_harmless(name):
                        self.seen.changed.add(name)
        elif event == "import":
            self.seen.imported.add(str(arguments[0]))
        elif event.startswith(_STARTS) and _CONFINED not in repr(arguments):
            self.seen.started.append(f"{event} {arguments!r}"[:200])
        elif event in _CONNECTS:
            self.seen.connected.append(f"{event} {arguments!r}"[:200])


def _name(path: str, descriptor: int) -> str:
    """Where a name is, though it may be a link: its folder is followed, and it is not."""
    if descriptor >= 0 and not os.path.isabs(path):
        path = os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), path)
    folder, last = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), last)


def _is_harmless(path: str) -> bool:
    return path.startswith("/dev/") or "__pycache__" in path


def watch(work: Callable[[], object], scratch: Path, seconds: float = 120) -> Seen:
    """Run `work` in a child of this process, and return what it did.

    Args:
        work: what is watched. An exit code that it returns is the child's, and an error's of ours is that error's.
        scratch: a folder for its temporary files and its home.
        seconds: how long it may take.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    report = scratch / "seen.json"

    def watched() -> None:
        home = scratch / "home"
        home.mkdir(exist_ok=True)
        os.environ.update(TMPDIR=str(home), HOME=str(home), XDG_STATE_HOME=str(home), XDG_CACHE_HOME=str(home))
        tempfile.tempdir = None
        notes = _Notes()
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        sys.addaudithook(notes)
        try:
            result = work()
            notes.seen.code = result if isinstance(result, int) else 0
        except TuneError as error:
            notes.seen.code, notes.seen.said = error.exit_code, str(error)
        except BaseException:
            notes.seen.code, notes.seen.said = 1, traceback.format_exc()
        notes.on = False
        notes.seen.seconds = time.monotonic() - start
        notes.seen.grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        report.write_text(json.dumps({key: _plain(value) for key, value in vars(notes.seen).items()}))

    wait(fork(watched), seconds)
    told = json.loads(report.read_text())
    report.unlink()
    return Seen(
        **{key: set(value) if key in ("opened", "changed", "imported") else value for key, value in told.items()}
    )


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def watch_command(arguments: list[str], scratch: Path, seconds: float = 120) -> Seen:
    """Run a command line as `tune` would, and return what it did; `said` is what it wrote on stderr."""
    log = scratch / "stderr"
    scratch.mkdir(parents=True, exist_ok=True)

    def work() -> int:
        from tune.cli.main import _run

        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        code = _run(arguments)
        sys.stderr.flush()
        return code

    seen = watch(work, scratch, seconds)
    seen.said = (seen.said + log.read_text(errors="replace")).strip()
    return seen
