"""`tune generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tune.errors import RunError
from tune.folder import folder_of


def generate(
    run: str, prompt: str, adapter: bool, system: str | None, max_new_tokens: int, temperature: float, quiet: bool
) -> None:
    """Print the answer as it comes."""
    if not prompt.strip():
        raise RunError("PROMPT is empty. Write what is to be answered, in quotes.")
    folder_of(run)  # a wrong name is told before anything is loaded
    with loading(quiet):
        from tune.evaluation.generate import load_run

        loaded = load_run(run)
    loaded.answer(
        prompt,
        adapter=adapter,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        on_text=write,
    )
    print()


def write(text: str) -> None:
    """Print a piece of an answer at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def loading(quiet: bool) -> Iterator[None]:
    """Say on a terminal that the model is being loaded, which takes seconds."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("loading the model"):
        yield
