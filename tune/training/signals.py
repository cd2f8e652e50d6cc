"""SIGINT and SIGTERM while a run trains: the first is noted, so that the run can end in order; the next is not."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Which of the two has come."""

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0 while none has come."""

    @contextlib.contextmanager
    def noted(self, say: Callable[[str], None]) -> Iterator[None]:
        """Note the first signal and go on; a second one takes its usual course.

        Args:
            say: hears what a signal does.
        """

        def note(number: int, frame: FrameType | None) -> None:
            self.number = number
            for each, handler in before.items():  # the other of the two as well: whoever sends it wants an end
                signal.signal(each, handler)
            # A signal that comes while a line is being printed cannot print another in its midst.
            with contextlib.suppress(RuntimeError):
                say(f"{signal.Signals(number).name}: saving a checkpoint after this step (again leaves at once)")

        before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread: whoever runs it handles signals
            for number in CAUGHT:
                before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
