"""`tune train`."""

from __future__ import annotations

import math
import os
import shutil
import sys

from tune.recipe.later import refusals
from tune.recipe.load import load_recipe


def train(recipe_path: str, overrides: list[str], resume: bool, quiet: bool) -> None:
    """Train, and end with where the adapter is, what changed and what to type next."""
    from tune.errors import RecipeError

    recipe = load_recipe(recipe_path, overrides)
    refused = refusals(recipe)
    if refused:
        raise RecipeError(refused)  # before torch is imported, which takes seconds

    from tune.cli.progress import ConsoleProgress, QuietProgress, size
    from tune.run import train as run_training

    progress = QuietProgress() if quiet else ConsoleProgress()
    try:
        result = run_training(recipe, resume, progress)
    finally:
        progress.close()
    if quiet or int(os.environ.get("RANK", "0")):
        return
    if result.already:
        print(f"already finished: {result.steps} steps, the adapter is in {result.adapter}")
        return
    best = (
        f"step {result.adapter_step} of {result.steps}, the best"
        if result.adapter_step != result.steps
        else "the last step"
    )
    print(f"\nadapter      {result.adapter}  ({best})")
    print(
        f"loss         {result.loss_before:.4f} before, {result.loss_after:.4f} after, on {result.measured_on}"
        f" (perplexity {_perplexity(result.loss_before)} to {_perplexity(result.loss_after)})"
    )
    print(f"speed        {result.tokens_per_second:,.0f} tokens/s")
    print(f"peak memory  {size(result.peak_memory_bytes)}")
    print(f'next         {_program()} generate {result.output} "your prompt"')


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20 else "very high"


def _program() -> str:
    """How to call this program from here: by its name if the shell finds it, else by its path."""
    script = os.path.join(os.path.dirname(sys.executable), "tune")
    if not os.path.exists(script):
        return f"{os.path.basename(sys.executable)} -m tune"
    found = shutil.which("tune")
    return "tune" if found and os.path.samefile(found, script) else os.path.relpath(script)
