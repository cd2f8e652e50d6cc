"""Saying that code of a base runs, before it does, wherever a verb takes a run and not a recipe."""

from __future__ import annotations

import sys

from tune.folder import RunFolder
from tune.recipe.load import load_recipe


def tell_own_code(run: RunFolder) -> None:
    """Print a line on stderr if the base's own code will run, since the run's recipe lets it.

    Raises:
        RunError: no recipe that this user gave has let it run here.
    """
    section = load_recipe(run.recipe).model
    if not section.trust_remote_code:
        return
    from tune.models.own_code import announce, refuse_unknown_code

    refuse_unknown_code(run, section)
    announce(section, lambda line: print(line, file=sys.stderr, flush=True))
