"""`tune train`."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tune.cli.program import command
from tune.folder import RunFolder, explain_os_errors
from tune.recipe.later import refusals
from tune.recipe.load import load_recipe

if TYPE_CHECKING:
    from tune.run import FinishedRun


def train(recipe_path: str, overrides: list[str], resume: bool, quiet: bool) -> None:
    """Train, and end with where the adapter is, what changed and what to type next."""
    from tune.errors import RecipeError

    recipe = load_recipe(recipe_path, overrides)
    refused = refusals(recipe)
    if refused:
        raise RecipeError(refused)  # before torch is imported, which takes seconds
    if os.environ.get("WORLD_SIZE", "1") == "1":
        run = RunFolder(Path(str(recipe.output)))
        with explain_os_errors(run.root):
            run.check_start(resume)
    if quiet:
        os.environ.setdefault("WANDB_SILENT", "true")

    from tune.cli.progress import ConsoleProgress, QuietProgress
    from tune.run import train as run_training

    progress = QuietProgress() if quiet else ConsoleProgress()
    try:
        result = run_training(recipe, resume, progress)
    finally:
        progress.close()
    if not quiet and not int(os.environ.get("RANK", "0")):
        _summarise(result)


def _summarise(result: FinishedRun) -> None:
    from tune.cli.progress import size

    if result.already:
        print(f"already finished: {result.steps} steps, the adapter is in {result.adapter}")
        return
    last = result.adapter_step == result.steps
    which = "the last step" if last else f"step {result.adapter_step} of {result.steps}, the best"
    held_out = result.measured_on == "held-out data"
    start, end = ("before", "after") if held_out else ("in the first step", "in the last")
    perplexities = f"perplexity {_perplexity(result.loss_before)} to {_perplexity(result.loss_after)}"
    print(f"\nadapter      {result.adapter}  ({which})")
    print(
        f"loss         {result.loss_before:.4f} {start}, {result.loss_after:.4f} {end}, on {result.measured_on}"
        f" ({perplexities})"
    )
    print(f"speed        {result.tokens_per_second:,.0f} tokens/s")
    print(f"peak memory  {size(result.peak_memory_bytes)}")
    print(f'next         {command("generate", result.output)} "your prompt"')
    if held_out and result.loss_after >= result.loss_before:
        print(
            "warning: the adapter is worse than the base on held-out data. Lower train.learning_rate, "
            "or look at the data with `tune preview`.",
            file=sys.stderr,
        )


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20 else "very high"
