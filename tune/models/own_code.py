"""Python code that comes with a base: which files it is, and whose recipe lets it run.

`model.trust_remote_code` in a recipe that a person gives to `tune train`, `tune check` or `tune preview` lets it run.
A run's folder holds a recipe too, and may come from somebody else: nobody expects that asking a downloaded run a
question runs the code that it names. So what was let run is noted for this user, outside of every run, and the verbs
that take a run go on only with code that is noted. Code is known by its content (a local base) or by the base's name
and commit (one from the Hub), so changed code is other code.

The notes are empty files in `$XDG_STATE_HOME/tune/own-code` (`~/.local/state/tune/own-code`): not in the cache, which
several people may share.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tune.data.auto_map import files_of_code
from tune.errors import RunError
from tune.folder import RunFolder
from tune.models.hub import commit_of, fetch, local_folder
from tune.recipe.schema import Model

GENERATE = "custom_generate/generate.py"
"""Where a model may bring a way of generating; transformers then runs it in the place of its own."""

_JSON = ("config.json", "tokenizer_config.json")


def code_of(section: Model) -> tuple[str, ...]:
    """Return the files of a base's own code, as it names them; none where it has none.

    Where it may not run, the model's alone are looked for.

    Raises:
        ModelError: the base cannot be found or asked for.
    """
    names = _JSON if section.trust_remote_code else _JSON[:1]
    found = [file for name in names for file in files_of_code(_read(section, name))]
    if section.trust_remote_code and _file(section, GENERATE) is not None:
        found.append(GENERATE)
    return tuple(dict.fromkeys(found))


def announce(section: Model, say: Callable[[str], None]) -> str:
    """Say which code of a base is about to run, or does not; return the files that run, empty when none do.

    Raises:
        ModelError: the base cannot be found or asked for.
    """
    files = ", ".join(code_of(section))
    if files:
        verb = "runs here" if section.trust_remote_code else "does not run"
        key = f"model.trust_remote_code: {str(section.trust_remote_code).lower()}"
        say(f"code that came with {section.base} {verb} ({key}): {files}")
    return files if section.trust_remote_code else ""


def allow(section: Model) -> str | None:
    """Note that a recipe which the user gave lets the base's own code run; return why that failed, if it did.

    Raises:
        ModelError: the base cannot be found or asked for.
    """
    if not section.trust_remote_code or not code_of(section):
        return None
    note = _note(section)
    try:
        note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        note.touch()
    except (OSError, RuntimeError) as error:
        return (
            f"{note.parent} cannot be written ({error}), so verbs that take the run will not know that its base's code "
            "may run. Set XDG_STATE_HOME to a folder that can."
        )
    return None


def refuse_unknown_code(run: RunFolder, section: Model) -> None:
    """Refuse to run the code of a run's base if no recipe that this user gave has let it run here.

    Raises:
        RunError: says which code, and how it is let run.
        ModelError: the base cannot be found or asked for.
    """
    if not section.trust_remote_code:
        return
    files = code_of(section)
    if files and not _note(section).is_file():
        raise RunError(
            f"{run.recipe}: lets Python code run that comes with {section.base} ({', '.join(files)}), and you have not "
            "let that code run on this machine, or it has changed. Read it; if you trust it, "
            f"`tune check {run.recipe}` lets it run."
        )


def is_same_code(folder: Path, base: Path) -> bool:
    """Whether all Python code in a folder, and all that its files name as code, is a base's too."""
    for name in _JSON:
        if not set(files_of_code(_parsed(folder / name))) <= set(files_of_code(_parsed(base / name))):
            return False
    for path in folder.rglob("*.py"):
        original = base / path.relative_to(folder)
        if not original.is_file() or original.read_bytes() != path.read_bytes():
            return False
    return True


def _note(section: Model) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "tune" / "own-code" / _digest(section)


def _digest(section: Model) -> str:
    """A SHA-256 by which the code is known again."""
    folder = local_folder(section.base)
    if folder is None:
        return hashlib.sha256(f"{section.base}\0{commit_of(section.base, section.revision)}".encode()).hexdigest()
    return code_digest(folder)


def code_digest(folder: Path) -> str:
    """Return a SHA-256 over all Python files of a base's folder, and over what of them is named as its code."""
    digest = hashlib.sha256()
    for name in _JSON:
        digest.update(json.dumps(files_of_code(_parsed(folder / name))).encode() + b"\0")
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _read(section: Model, name: str) -> Any:
    path = _file(section, name)
    return None if path is None else _parsed(path)


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever needs the file says what is wrong with it
        return None


def _file(section: Model, name: str) -> Path | None:
    """One file of a base, or None where it has none; offline, where none is in the cache."""
    folder = local_folder(section.base)
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import is_offline_mode, try_to_load_from_cache

    if is_offline_mode():
        cached = try_to_load_from_cache(section.base, name, revision=section.revision)
        return Path(cached) if isinstance(cached, str) else None
    return fetch(section.base, name, section.revision)
