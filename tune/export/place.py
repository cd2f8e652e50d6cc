"""Where a merge goes, and what may be there already; told before anything heavy is imported."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from pathlib import Path

from tune.errors import RunError
from tune.files.foreign import read_object
from tune.folder import PROOF, UNPROVEN, folder_of
from tune.folder.places import open_lock


def find_output(path: str | Path) -> Path:
    """Return where the merge of a run or checkpoint goes if nobody says otherwise.

    Raises:
        RunError: there is no run, or nothing of it to merge.
    """
    run, adapter = folder_of(path)
    return run.merged if adapter == run.adapter else run.root / f"merged-{adapter.name}"


def check_free(folder: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        RunError: says what it is.
    """
    if not os.path.lexists(folder):  # a link that leads nowhere is there too
        return
    _sweep(beside(folder))
    if not (folder / PROOF).is_file():
        raise RunError(f"{folder}: is there already, and a merge goes into a new folder. Give another --output.")
    if (folder / UNPROVEN).exists() or _verdict(folder) == "failed":
        raise RunError(f"{folder}: holds a merge whose proof failed. Remove it, or give another --output.")
    raise RunError(
        f"{folder}: holds a proven merge already. Use it (--prove proves it again), remove it, or give another "
        "--output."
    )


def _verdict(folder: Path) -> object:
    try:
        return read_object(folder / PROOF)["verdict"]
    except (OSError, ValueError, KeyError):
        return None


def beside(folder: Path) -> Path:
    """Return the hidden folder where the merge to `folder` is made."""
    return folder.parent / f".merging-{folder.name}"


def _sweep(work: Path) -> None:
    """Remove what a merge left that was killed after its last rename."""
    if (work / "model").exists() or not work.is_dir() or work.is_symlink():
        return
    with contextlib.suppress(OSError, RunError), open_lock(work / ".lock") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(work)
