"""A recipe is read without the heavy libraries, in little time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import sys, time
from tune.errors import RecipeError
from tune.recipe import later
from tune.recipe.load import load_recipe
try:
    load_recipe(sys.argv[1])
except RecipeError as error:
    assert len(error.problems) == 3, error
else:
    raise SystemExit("the recipe was accepted")
heavy = {"torch", "transformers", "numpy", "datasets", "peft", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
print(time.process_time())
"""


def test_a_bad_recipe_costs_little_and_imports_nothing_heavy(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: {bse: x}\ndata: {train: a}\ntrain: {seed: -1}\nlora_r: 8\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(recipe)]
    runs = [subprocess.run(command, capture_output=True, text=True, env=environment, check=False) for _ in range(2)]
    assert [run.stderr for run in runs] == ["", ""]
    # The first run may compile bytecode.
    assert float(runs[1].stdout) < 0.4
