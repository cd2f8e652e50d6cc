"""Python pickles, which can run any code when they are read: told by their names and first bytes, and never opened.

Weights and state are read from safetensors and JSON alone. In a folder of somebody else's a pickle may lie beside the
safetensors (a Trainer's `training_args.bin`, a base's older `pytorch_model.bin`): nothing here looks for such a name,
so it is no danger there. What this program wrote holds none, so one in such a folder came later and is refused.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from tune.errors import ModelError, RunError

ENDINGS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill")
"""What the names of files end in that hold pickles, or most likely do."""

# torch's zip archives, pickles of protocol 2 and later, and older ones that begin with a name to import.
_BEGINNING = re.compile(rb"PK\x03\x04|\x80[\x02-\x05]|\(*c[\w.]+\n[\w.]+\n")
_READ = 64


def pickles_among(names: Iterable[str]) -> list[str]:
    """Return the file names that say "a pickle", sorted."""
    return sorted(name for name in names if name.lower().endswith(ENDINGS))


def pickles_in(folder: Path) -> list[str]:
    """Return the names of a folder's files that say "a pickle", sorted; of none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return pickles_among(entry.name for entry in entries if not entry.is_dir())
    except OSError:  # whoever reads the folder says what is wrong with it
        return []


def is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle or as an archive of some does, whatever its name says."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with open(path, "rb") as file:
            start = file.read(_READ)
    except OSError:  # whoever reads the file says what is wrong with it
        return False
    # safetensors begin with the length of their header, which may happen to read like a pickle's first bytes.
    return bool(_BEGINNING.match(start)) and start[8:9] != b"{"


def refuse_disguised(path: Path, where: str | None = None) -> None:
    """Refuse a pickle that has the name of a safetensors file. `where` is what the message starts with, else the path.

    Raises:
        ModelError: the file is a pickle.
    """
    if is_pickle(path):
        raise ModelError(
            f"{where or path}: {path.name} is a Python pickle under the name of a safetensors file. A pickle can run "
            "code when it is read, so none is. Fetch the real file, and do not load this one anywhere."
        )


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder that this program wrote, a checkpoint or a run's adapter, in which a pickle lies now.

    Raises:
        RunError: names the first.
    """
    if found := pickles_in(folder):
        raise RunError(
            f"{folder / found[0]}: is a Python pickle, which can run code when it is read. tune writes none, so it was "
            "put there by something else. Remove it, and ask where this folder has been."
        )
