"""`tune generate`: one prompt, one answer.

The answer is printed as it comes, and nothing else. The prompt is written with the template and the system prompt
that trained, and the answer ends where the template ends a turn, or after `--max-new-tokens`. `--system ""` leaves a
trained system prompt out.

RUN is a run, whose adapter answers; one of its checkpoints; or the folder of a whole model: what `tune merge` wrote,
or any causal language model with a chat template. A whole model is loaded as it is, without quantisation, in the type
that its config names (float16 as float32, which rounds nothing). It has no adapter, so `--without-adapter` is refused.

Python code that came with a run's base runs only if `model.trust_remote_code` is true in the run's recipe, and if you
have let this very code run on this machine, by a recipe given to `tune train`, `tune check` or `tune preview`. A line
on stderr says so before it does. Of a whole model no code runs.

A merge whose proof failed has a file UNPROVEN beside its weights: it answers after a warning, since its answers may
not be the run's.

## Example

```
$ tune generate runs/quickstart "How do I keep my feet warm in winter?"
Ahoy, friend! Wear warm socks, keep your feet warm with a towel, and keep them dry. Fair winds, Wren of Gull Rock.
```
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tune.cli.output import as_it_is
from tune.cli.own_code import tell_own_code
from tune.errors import RunError
from tune.evaluation.whole_model import is_unproven, is_whole_model, no_adapter
from tune.folder import folder_of

if TYPE_CHECKING:
    from tune.evaluation.generate import Speaker


def generate(
    run: str, prompt: str, adapter: bool, system: str | None, max_new_tokens: int, temperature: float, quiet: bool
) -> None:
    """Print the answer as it comes."""
    if not prompt.strip():
        raise RunError("PROMPT is empty. Write what is to be answered, in quotes.")
    load(run, adapter, quiet).answer(
        prompt,
        adapter=adapter,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        on_text=write,
    )
    print()


def load(run: str, adapter: bool, quiet: bool) -> Speaker:
    """Load whoever is to answer, a run's adapter or a whole model.

    Raises:
        UserError: there is nothing to load, something of it is wrong, or it has no adapter to leave out.
    """
    whole = is_whole_model(run)
    if whole and not adapter:
        raise RunError(no_adapter(run))
    if not whole:
        tell_own_code(folder_of(run)[0])  # a wrong name is told before anything is loaded
    elif is_unproven(run):
        print(
            f"warning: {run}: the proof of this merge failed (merge-proof.json says how), so its answers may not be "
            "those of the run. Merge again before you use it.",
            file=sys.stderr,
        )
    with _loading(quiet):
        from tune.evaluation.generate import load_merged, load_run

        return load_merged(run) if whole else load_run(run)


def write(text: str) -> None:
    """Print a piece of an answer at once."""
    as_it_is().write(text)
    as_it_is().flush()


@contextmanager
def _loading(quiet: bool) -> Iterator[None]:
    """Say on a terminal that the model is being loaded, which takes seconds."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status("loading the model"):
        yield
