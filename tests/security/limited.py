"""A call in a forked child with a limit of time and memory, of which the files that it opens are noted.

Reading somebody else's files may end a process (a library aborts), fill the memory or take for ever; none of that must
happen to the tests' own process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tune.errors import TuneError

_ROOM = 3 << 30
"""Bytes of address space that a child may take beside what it was forked with."""


@dataclass(frozen=True)
class Ended:
    """How it went."""

    code: int
    """0, the exit code of a TuneError, or of the process: negative for a signal."""
    said: str
    """The error's message, or what the call returned."""
    grown: int
    """Bytes that the peak of its resident memory lay above what it was forked with."""
    opened: tuple[str, ...]
    """Files that were opened under the watched folders."""
    noise: str
    """What was printed to stderr besides."""


def limited(work: Callable[[], object], watched: Iterable[Path | str] = ("/etc",), seconds: int = 20) -> Ended:
    """Call `work` in a child and return how it ended. A TuneError is one way to end; any other exception shows."""
    places = tuple(str(place) for place in watched)
    reading, writing = os.pipe()
    opening, noting = os.pipe()
    errors, erring = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            for descriptor in (reading, opening, errors):
                os.close(descriptor)
            os.dup2(erring, 2)
            _limit(seconds)

            def note(event: str, given: tuple[object, ...]) -> None:
                if event == "open" and isinstance(given[0], str | bytes | os.PathLike):
                    path = os.path.realpath(os.fsdecode(given[0]))
                    if path.startswith(places):
                        os.write(noting, f"{path}\n".encode())

            warnings.simplefilter("ignore")  # as the command line does
            sys.addaudithook(note)
            try:
                said, code = repr(work()), 0
            except TuneError as error:
                said, code = str(error), error.exit_code
            except BaseException as error:
                said, code = f"{type(error).__name__}: {error}", 99
            os.write(writing, said.encode("utf-8", "backslashreplace")[:4000])
        finally:
            os._exit(code)
    for descriptor in (writing, noting, erring):
        os.close(descriptor)
    said, opened, noise = (_all(descriptor) for descriptor in (reading, opening, errors))
    _, status, used = os.wait4(child, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Ended(
        os.waitstatus_to_exitcode(status), said, max(0, used.ru_maxrss - before) * 1024, tuple(opened.split()), noise
    )


def assert_one_message(ended: Ended, *words: str, most: int = 300 << 20) -> None:
    """It ended with one line that holds `words`, took little memory, and opened nothing that was watched."""
    assert ended.code == 2, ended
    assert len(ended.said.splitlines()) == 1, ended
    for word in words:
        assert word in ended.said, ended
    assert ended.grown < most, ended
    assert ended.opened == (), ended


def _limit(seconds: int) -> None:
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + _ROOM, taken + _ROOM))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)


def _all(descriptor: int) -> str:
    with os.fdopen(descriptor, "rb") as file:
        return file.read().decode("utf-8", "replace")
