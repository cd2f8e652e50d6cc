"""metrics.jsonl, one object a step, and the trackers that the recipe names."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

import torch

from tune.errors import RecipeError, RunError
from tune.files.foreign import objects_in
from tune.folder import RunFolder, explain_os_errors, write_file
from tune.recipe.schema import Recipe
from tune.secrets import redact, redact_all
from tune.training.devices import Devices


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Metrics:
    """Writes a step's metrics to the run folder and to the trackers; silent on every process but the first."""

    def __init__(self, run: RunFolder, recipe: Recipe, devices: Devices, step: int) -> None:
        """Open the log at `step`: what a killed process wrote beyond its last checkpoint is dropped."""
        self._file: IO[str] | None = None
        self._path = run.metrics
        self._trackers: list[Any] = []
        devices.first(lambda: self._open(run, recipe, step))

    def _open(self, run: RunFolder, recipe: Recipe, step: int) -> None:
        with explain_os_errors(run.root, "go on with --resume"):
            _keep_until(run, step)
            self._file = open(run.metrics, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._trackers = _trackers(run, recipe)

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step; numbers that JSON has no word for become null."""
        if self._file is None:
            return
        plain = redact_all(finite(metrics))  # the places of rows are texts
        line = json.dumps(plain, allow_nan=False) + "\n"
        with explain_os_errors(self._path, "go on with --resume"):
            self._file.write(line)
            self._file.flush()
        for tracker in self._trackers:
            tracker.log({k: v for k, v in _series(plain) if k != "step" and v is not None}, step=metrics["step"])

    def close(self) -> None:
        """End the log and the trackers."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk: said already, when a line could not be written
                self._file.close()
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def finite(value: Any) -> Any:
    """Return what JSON can hold of `value`: an infinity or NaN becomes null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not (abs(value) < float("inf")) else value


def _series(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each number under a name of its own: trackers draw a curve for `router/entropy/0`, and none for a list."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _series(inner, f"{name}/{key}" if name else str(key))
    else:
        yield name, value


def _keep_until(run: RunFolder, step: int) -> None:
    if not run.metrics.is_file():
        return
    kept = []
    try:
        for entry in objects_in(run.metrics):
            if type(number := entry.get("step")) is not int:
                break
            if number <= step:
                kept.append(json.dumps(entry) + "\n")
    except ValueError as error:
        raise RunError(f"{run.metrics}: {error}. Remove it, then go on with --resume.") from error
    write_file(run.metrics, "".join(kept))


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not installed, before anything is loaded or written.

    Raises:
        RecipeError: the tracker's name and how to install it.
    """
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            raise RecipeError(f"tracking.to: {name} is not installed. Install it with `pip install {name}`.")


def _trackers(run: RunFolder, recipe: Recipe) -> list[Any]:
    names = recipe.tracking.to
    if not names:
        return []
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    project, title = redact(recipe.tracking.project or "tune"), redact(recipe.tracking.name or run.root.name)
    identity = run.root / ".tracking-id"
    if not identity.is_file():
        write_file(identity, secrets.token_hex(4))
    trackers = []
    for kind in names:
        made = LOGGER_TYPE_TO_CLASS[kind]
        try:
            if kind == "wandb":
                run_id = identity.read_text(encoding="utf-8").strip()
                tracker = made(project, name=title, id=run_id, resume="allow", dir=os.fspath(run.root))
            elif made.requires_logging_directory:
                tracker = made(project, run.root)
            else:
                tracker = made(project, name=title)
            tracker.start()
            tracker.store_init_configuration(_flat(redact_all(recipe.model_dump(mode="json"))))
        # A refused login, a missing network, a full quota: each tracker raises its own kind.
        except Exception as error:
            said = " ".join(redact(str(error)).split())[:300].rstrip(".")
            raise RunError(
                f"tracking.to: {kind} does not start ({said}). Log in to it or remove it, then go on with --resume."
            ) from error
        trackers.append(tracker)
    return trackers


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Trackers take plain values only: nested keys are dotted, lists written out."""
    if not isinstance(value, dict):
        return {prefix: value if isinstance(value, int | float | str | bool) else str(value)}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
