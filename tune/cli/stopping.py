"""SIGINT and SIGTERM where no step is under way that could end first: while a run starts, or ends, or at the second."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from tune.errors import StoppedError

_AGAIN = 0.5
"""Seconds."""


class _StopError(KeyboardInterrupt):
    """What a signal raises: libraries that clean up after a Ctrl-C do so for this one as well."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def stopping_at_once(where: str) -> Iterator[None]:
    """Leave at SIGINT or SIGTERM with one line, wherever the program is; should a library dally, a second one kills.

    Args:
        where: the run, for the line.

    Raises:
        StoppedError: a signal came.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)

        def insist(alarm: int, frame: FrameType | None) -> None:
            raise _StopError(number)

        # While libraries are imported, an exception may end in a callback or a bare `except`: then it is raised anew.
        signal.signal(signal.SIGALRM, insist)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        raise _StopError(number)

    def unheard(what: Any) -> None:
        if not issubclass(what.exc_type, _StopError):  # that one comes again, and is no news
            hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, unheard
    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread: whoever runs it handles signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, leave)
    try:
        yield
    except _StopError as stop:
        signal.setitimer(signal.ITIMER_REAL, 0)
        name = signal.Signals(stop.number).name
        message = f"{where}: stopped by {name} at once. Go on with the same command and --resume."
        raise StoppedError(message, 128 + stop.number) from None
    finally:
        sys.unraisablehook = hook
        for each, handler in before.items():
            signal.signal(each, handler)
