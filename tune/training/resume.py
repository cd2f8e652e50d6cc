"""Whether a run may start or go on: the folder as it is, and what may change on the way.

On a resume the recipe must be the one that was started, but for what does not change the result (cadences,
tracking, how a step is laid out) and for a longer training, whose schedule is derived again.
"""

from __future__ import annotations

import json
from typing import Any

from tune.errors import RunError
from tune.folder import RunFolder, damage
from tune.progress import Progress
from tune.recipe.load import load_recipe
from tune.recipe.schema import Recipe
from tune.secrets import same_but_hidden
from tune.training.checkpoint import TrainingState, machine_differences, newest_whole, read_state
from tune.training.devices import Devices

MAY_CHANGE = (
    "output",
    "tracking",
    "push",
    "train.save_every",
    "train.eval_every",
    "train.log_every",
    "train.keep",
    "train.micro_batch_tokens",
    "train.recompute",
)
MAY_GROW = ("train.epochs", "train.max_steps")


def check_same(run: RunFolder, recipe: Recipe) -> bool:
    """Compare the recipe with the one the run was started with; return whether the training was made longer.

    Raises:
        RunError: each key that differs and may not, with its old and new value.
    """
    old, new = _flat(load_recipe(run.recipe).model_dump(mode="json")), _flat(recipe.model_dump(mode="json"))
    problems, longer = [], False
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        # What a secret was is not known any more, and it may have changed since; data and base have fingerprints.
        if same_but_hidden(before, after) or any(key == name or key.startswith(name + ".") for name in MAY_CHANGE):
            continue
        if key in MAY_GROW and _grows(key, before, after):
            longer = True
            continue
        rule = "may only grow" if key in MAY_GROW else "cannot change"
        problems.append(f"{run.root}: {key} {rule} on --resume (was {before}, is {after}). Put it back, or start anew.")
    if problems:
        raise RunError(problems)
    return longer


def check_alike(devices: Devices, recipe: Recipe, resume: bool) -> None:
    """Refuse processes that were started with different recipes: they would wait for each other for ever.

    Raises:
        RunError: each key that differs; the same on every process.
    """
    said = devices.gather(json.dumps({**_flat(recipe.model_dump(mode="json")), "--resume": resume}))
    first, *others = (json.loads(text) for text in said)
    problems = []
    for number, other in enumerate(others, start=1):
        problems += [
            f"accelerate launch: process {number} has {key}: {_word(other, key)}, process 0 has {_word(first, key)}. "
            "Start every process with the same recipe and overrides."
            for key in sorted(first.keys() | other.keys())
            if first.get(key) != other.get(key)
        ]
    if problems:
        raise RunError(problems)


def _word(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "nothing"


def check_sources(run: RunFolder, data: str, base: str) -> None:
    """Refuse data or a base that are not those of a run's newest whole checkpoint, if it has one.

    Raises:
        RunError: which of them has changed.
    """
    step, _ = newest_whole(run)
    if step is not None:
        _refuse_changed(run, read_state(run.checkpoint(step))[0], data, base)


def _refuse_changed(run: RunFolder, state: TrainingState, data: str, base: str) -> None:
    for name, before, now in (("data", state.data_fingerprint, data), ("base", state.base_fingerprint, base)):
        if before != now:
            raise RunError(
                f"{run.root}: the {name} has changed since this run began (fingerprint was {before[:12]}, is "
                f"{now[:12]}). Put the old files back, or start anew with another output."
            )


def find_checkpoint(run: RunFolder, data: str, base: str, progress: Progress) -> TrainingState | None:
    """Return the state to go on from, or None for the start, and say what is used and what differs.

    Args:
        run: the run.
        data: fingerprint of the encoded examples as they are now.
        base: fingerprint of the base's files as they are now.
        progress: hears which checkpoint is used.

    Raises:
        RunError: data or base are not those the run was started with.
    """
    step, damaged = newest_whole(run)
    for number in damaged:
        progress.warn(f"{run.checkpoint(number)} is damaged ({damage(run.checkpoint(number))}) and is passed over")
    if step is None:
        progress.line(f"resume from step 0: {'no undamaged checkpoint' if damaged else 'no checkpoint yet'}")
        return None
    state, saved = read_state(run.checkpoint(step))
    _refuse_changed(run, state, data, base)
    progress.line(f"resume from step {step}")
    differences = machine_differences(saved)
    if differences:
        progress.warn(
            f"not the machine this run began on ({'; '.join(differences)}): it will not end bit for bit the same"
        )
    return state


def _grows(key: str, before: Any, after: Any) -> bool:
    if before is None or after is None:
        return key == "train.max_steps"  # the other key decides then; the schedule is derived again either way
    return bool(after > before)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat.update(_flat(inner, f"{prefix}.{key}" if prefix else str(key)))
    return flat
