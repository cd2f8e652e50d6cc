"""The way out for everything that is printed, by tune and by the libraries below it: secrets are hidden on it.

What a person asked to see as it is (the examples of a preview, the answers of a model) goes around it: there a secret
stands in the data, and to hide it would hide that it is learnt.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tune.secrets import redact


class Hiding:
    """A text stream on which no secret comes out; in all else it is the stream that it stands before."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._pass: Callable[[str], Any] = stream.write
        self._within = threading.local()

    @property
    def write(self) -> Callable[[str], Any]:
        """Write a text without the secrets in it."""
        return self._write

    @write.setter
    def write(self, wrapper: Callable[[str], Any]) -> None:
        # wandb puts a function of its own in this place, which keeps what is printed and then calls what stood here.
        # It is to be given what comes out.
        self._pass = wrapper

    def _write(self, text: str) -> int:
        if getattr(self._within, "wrapper", False):
            self.stream.write(text)
            return len(text)
        self._within.wrapper = True
        try:
            self._pass(redact(text))
        finally:
            self._within.wrapper = False
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self._write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def hide_secrets() -> None:
    """Let nothing out on stdout and stderr but through `Hiding`, until the process ends."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Hiding):
            setattr(sys, name, Hiding(stream))


@contextlib.contextmanager
def hiding_secrets() -> Iterator[None]:
    """As `hide_secrets`, until the end of the block."""
    before = sys.stdout, sys.stderr
    hide_secrets()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def as_it_is() -> TextIO:
    """The stdout on which what a person asked for is shown word for word."""
    stream = sys.stdout
    return stream.stream if isinstance(stream, Hiding) else stream
