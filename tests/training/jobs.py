"""A tiny recipe with its data, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import write_model
from tune.recipe.load import load_recipe
from tune.recipe.schema import Recipe

WORDS = [
    "the",
    "lamp",
    "turns",
    "over",
    "a",
    "calm",
    "sea",
    "and",
    "the",
    "keeper",
    "writes",
    "down",
    "every",
    "ship",
    "that",
    "passes",
    "before",
    "the",
    "tide",
]


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """Alpaca rows of varied length, a function of their number alone."""
    rows = []
    for number in range(start, start + count):
        length = 3 + (number * 7) % 23
        answer = " ".join(WORDS[(number + i * (1 + number % 5)) % len(WORDS)] for i in range(length))
        rows.append({"instruction": f"Say {number} things.", "input": "", "output": answer})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_recipe(folder: Path, family: str = "mistral", base: str | Path | None = None, **changes: Any) -> Recipe:
    """Write base and data under `folder` and return a recipe; `changes` are dotted keys with __ for the dot."""
    folder.mkdir(parents=True, exist_ok=True)
    if base is None:
        base = folder / "base"
        if not base.exists():
            write_model(base, family)
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", 40)
        write_rows(folder / "eval.jsonl", 6, start=100)
    settings = {
        "model.base": base,
        "model.dtype": "float32",
        "adapter.rank": 4,
        "data.train": folder / "train.jsonl",
        "data.template": "alpaca",
        "data.max_length": 256,
        "train.batch_size": 8,
        "train.learning_rate": 0.01,
        "train.max_steps": 10,
        "train.save_every": 3,
        "train.warmup": 0,
        "output": folder / "run",
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    path = folder / "recipe.yaml"
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *outer, last = key.split(".")
        place = nested
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = str(value) if isinstance(value, Path) else value
    path.write_text(json.dumps(nested))
    return load_recipe(path)
