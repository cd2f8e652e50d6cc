"""Whether a folder is a model that stands by itself, and what to say of one; nothing is loaded for that."""

from __future__ import annotations

import os
from pathlib import Path

from tune.folder import UNPROVEN


def is_whole_model(path: str | Path) -> bool:
    """Whether a folder is a model rather than a run.

    A run that holds a merged model too is a run; a model that was published with its recipe is a model.
    """
    folder = Path(path).expanduser()
    if not os.path.isfile(folder / "config.json"):
        return False
    return not os.path.isfile(folder / "recipe.yaml") or any(folder.glob("*.safetensors"))


def is_unproven(path: str | Path) -> bool:
    """Whether it is a merge whose proof failed."""
    return (Path(path).expanduser() / UNPROVEN).exists()


def no_adapter(path: str | Path) -> str:
    """Why the base under a whole model cannot answer, and what to do."""
    folder = Path(path).expanduser()
    run = f", {Path(path).parent}" if (folder.resolve().parent / "recipe.yaml").is_file() else ""
    return (
        f"{path}: is a whole model, so there is no adapter to leave out. "
        f"For the base's answer, give the run that it was merged from{run}."
    )
