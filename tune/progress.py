"""What a run tells while it works, without knowing who listens: the command line draws it, Python users ignore it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """Hears everything and says nothing. The command line overrides what it shows."""

    def line(self, text: str) -> None:
        """One literal line, such as `devices 1`."""

    def warn(self, text: str) -> None:
        """Something that the user should know, and that does not stop the run."""

    @contextmanager
    def phase(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """A stretch of work; the function yielded takes (done, total)."""
        yield lambda done, total: None

    def coverage(self, coverage: Any) -> None:
        """The start-up table (a `tune.adapters.coverage.Coverage`)."""

    def steps(self, done: int, total: int) -> None:
        """Training begins, with `done` steps behind it."""

    def step(self, metrics: dict[str, Any], total: int, log: bool) -> None:
        """A step has ended; `log` says whether it falls on `log_every`."""

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        """The held-out loss after `step` steps."""

    def checkpoint(self, step: int) -> None:
        """A checkpoint of `step` is on the disk."""


def size(count: float) -> str:
    """Bytes in words: 3.3 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
