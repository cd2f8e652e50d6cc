"""What can go wrong, as one tree.

    TuneError                  exit 1 unless a subclass says otherwise
    ├── UserError              exit 2: the user can mend it; the message says how
    │   ├── RecipeError        the recipe: unknown keys, wrong values, impossible combinations
    │   ├── DataError          the data: files, rows, formats, templates, tokenizers
    │   ├── ModelError         the base model or adapter: not found, not permitted, not supported
    │   └── RunError           the run folder: exists, locked, unwritable, does not match on resume
    │       └── ElsewhereError another process of the run failed, and has said why
    ├── UntrustworthyError     exit 3: finished, but the result cannot be trusted (the loss diverged)
    └── StoppedError           exit 130 or 143: a signal ended the run after a checkpoint

A message reads `where: what is wrong (the value). What to do about it.`, where `where` is `file:line`
if there is one. Several problems of one kind are raised together, one a line. Secrets are hidden when the error is
made, so that a message can be printed, logged and sent wherever it goes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tune.secrets import redact


class TuneError(Exception):
    """Base of every error that tune raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class UserError(TuneError):
    """Something the user can mend. Takes one message, or several to be shown a line each."""

    exit_code = 2

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems: list[str] = [as_line(p) for p in ([problems] if isinstance(problems, str) else problems)]
        super().__init__("\n".join(self.problems))


def as_line(text: str) -> str:
    """The text as one line that can be shown on a terminal: what it quotes may hold anything, and be of any length.

    Characters that do not print, such as those that a terminal takes as commands, are spelled out (`\\x1b`); of more
    than 2,000 characters, the first 1,500 and the last 500, with the remedy, are kept.
    """
    text = redact(text)  # before it is cut: half a secret would not be known as one
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return line if len(line) <= 2000 else f"{line[:1500]} ... {line[-500:]}"


class RecipeError(UserError):
    """The recipe asks for something that does not exist, contradicts itself or is not built yet."""


class DataError(UserError):
    """A data file, row, format, template or tokenizer cannot be used as the recipe says."""


class ModelError(UserError):
    """The base model or an adapter cannot be found, read, permitted or supported."""


class RunError(UserError):
    """The run folder cannot be used: it exists, is locked, is unwritable or belongs to another recipe."""


class ElsewhereError(RunError):
    """Another process of the same run failed, and has said why."""


class UntrustworthyError(TuneError):
    """The work ended, and its result must not be used."""

    exit_code = 3

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class StoppedError(TuneError):
    """A signal ended the run after a checkpoint was written; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(redact(message))
        self.exit_code = exit_code


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest of `known`, or an empty string when none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
