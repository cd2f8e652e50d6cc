"""Checkpoints: everything that a run needs to go on and end bit for bit where it would have ended.

A checkpoint is a PEFT folder (so it can be tried like any adapter) with two files more:

    adapter_config.json, adapter_model.safetensors     the adapter, in float32
    optimizer.safetensors                              the moments, by parameter
    state.json                                         step, schedule, random numbers, what was measured, machine
    manifest.json                                      the SHA-256 of each file

It is written beside its place and renamed, so a folder of that name is whole; one that was damaged later is found
by its manifest, and the one before it is used. No pickle is written or read.

Random numbers need no saved state: the generators are seeded anew at every step from (seed, step, process), and
the order of the data is a function of (seed, step). Dropout is therefore the same after a resume as without one.
"""

from __future__ import annotations

import json
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load, save

from tune.adapters.lora import adapter_bytes, adapter_config_text, read_adapter
from tune.errors import ModelError, RunError
from tune.files.pickles import refuse_disguised, refuse_foreign
from tune.folder import RunFolder, explain_os_errors, records, whole, write_folder
from tune.models.shards import read_header
from tune.planning.memory import Recompute
from tune.recipe.read import shown
from tune.training.metrics import finite
from tune.training.optimizer import NamedParameters, optimizer_state, restore_optimizer
from tune.training.router_balance import routers_of
from tune.versions import versions


@dataclass(slots=True)
class TrainingState:
    """What changes from step to step beside the adapter and the optimizer."""

    step: int = 0
    """Optimizer steps done."""
    bad_steps: int = 0
    """Steps in a row that were not applied."""
    best_step: int | None = None
    best_loss: float | None = None
    evaluations_since_best: int = 0
    first_loss: float | None = None
    """Held-out loss before the first step, or the first step's own when nothing is held out."""
    last_loss: float | None = None
    """The newest held-out loss, or the newest step's own."""
    first_eval_done: bool = False
    trained_seconds: float = 0.0
    trained_tokens: int = 0
    """Tokens that went through the model in those seconds."""
    total_steps: int = 0
    """Length of the schedule that the learning rate follows."""
    data_fingerprint: str = ""
    """Of the encoded training and held-out examples."""
    base_fingerprint: str = ""
    """Of the base's files."""
    row_tokens: int = 0
    """Longest row, so that an automatic choice is made once for the whole run."""
    shortened_from: int = 0
    """What the longest row was planned to be, if memory ran out and rows are shorter since; else 0."""
    recompute: Recompute = "none"
    """What the backward computes again."""
    expert_counts: list[list[int]] | None = None
    """Tokens that chose each expert of each layer in the newest step that was applied; the next balance loss goes by
    them."""
    unlogged: dict[str, Any] | None = None
    """The metrics of the newest step while the evaluation that belongs to it is still to come."""


def machine() -> dict[str, Any]:
    """What bit-equality depends on: kind of machine, thread count and versions."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": gpu or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "versions": versions(),
    }


def machine_differences(saved: dict[str, Any]) -> list[str]:
    """Say each way in which this machine differs from the one a checkpoint was written on."""
    now, differences = machine(), []
    for key in ("machine", "cpu_capability", "threads", "processes"):
        if saved.get(key) != now[key]:
            differences.append(f"{key} was {shown(saved.get(key))}, is {now[key]}")
    for name, version in now["versions"].items():
        before = (saved.get("versions") or {}).get(name)
        if before != version:
            differences.append(f"{name} was {shown(before)}, is {version}")
    return differences


def save_checkpoint(
    run: RunFolder,
    state: TrainingState,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    named: NamedParameters,
    seed: int,
) -> None:
    """Write the checkpoint of `state.step`.

    Raises:
        RunError: there is no space or no permission; earlier checkpoints are untouched.
    """
    tensors, numbers = optimizer_state(optimizer, named)
    content = {
        **asdict(state),
        "optimizer": numbers,
        "scheduler": {
            k: v for k, v in scheduler.state_dict().items() if isinstance(v, int | float | list) and k != "lr_lambdas"
        },
        "random": {"seed": seed, "scheme": "generators are seeded at every step from (seed, step, process)"},
        **machine(),
    }
    run.check_there()
    newest = run.steps()
    kept = f"the last whole checkpoint is {run.checkpoint(newest[-1])}" if newest else "there is no checkpoint yet"
    with explain_os_errors(run.root, f"go on with --resume ({kept})"):
        write_folder(
            run.checkpoint(state.step),
            {
                "adapter_config.json": adapter_config_text(model),
                "adapter_model.safetensors": adapter_bytes(model),
                "optimizer.safetensors": save(tensors),
                "state.json": json.dumps(finite(content), indent=1, allow_nan=False) + "\n",
            },
            manifest=True,
        )


def prune(run: RunFolder, keep: int, best_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for step in run.steps()[:-keep]:
        if step != best_step:
            shutil.rmtree(run.checkpoint(step))


def forget_after(run: RunFolder, step: int) -> None:
    """Remove the checkpoints beyond `step`, where the run goes on: damaged ones, or another course's."""
    for number in run.steps():
        if number > step:
            shutil.rmtree(run.checkpoint(number))


def newest_whole(run: RunFolder) -> tuple[int | None, list[int]]:
    """Return the newest step with an undamaged checkpoint (or None), and the damaged ones that were passed over.

    Raises:
        RunError: a pickle lies in one of them.
    """
    damaged: list[int] = []
    for step in reversed(run.steps()):
        refuse_foreign(run.checkpoint(step))
        if whole(run.checkpoint(step)):
            return step, damaged
        damaged.append(step)
    return None, damaged


def read_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Return the training state of a checkpoint, and all of its state.json."""
    try:
        content = records.read_state(folder / "state.json")
        names = TrainingState.__dataclass_fields__
        if isinstance(content.get("recompute"), bool):  # as an earlier version wrote it
            content["recompute"] = "full" if content["recompute"] else "none"
        state = TrainingState(**{key: value for key, value in content.items() if key in names})
        if state.unlogged is not None:  # JSON has no word for a number that is not finite
            state.unlogged = {key: float("nan") if value is None else value for key, value in state.unlogged.items()}
        return state, content
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder}: its state.json cannot be read ({error}). Remove this folder to use the one before."
        ) from error


def restore_checkpoint(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, named: NamedParameters
) -> TrainingState:
    """Put adapter and optimizer back as they were after the checkpoint's last step."""
    state, content = read_state(folder)
    read_adapter(folder, model)
    moments = folder / "optimizer.safetensors"
    refuse_disguised(moments)
    try:
        read_header(moments)  # before anything of it is taken into memory
        tensors = load(moments.read_bytes())
        restore_optimizer(optimizer, named, tensors, content.get("optimizer") or {})
    except (OSError, ValueError, SafetensorError, ModelError) as error:
        raise RunError(f"{moments}: cannot be read ({error}). Remove its folder to use the one before.") from error
    _check_counts(folder, state, model)
    return state


def _check_counts(folder: Path, state: TrainingState, model: PeftModel) -> None:
    """Refuse counts of another model's experts."""
    counts, routers = state.expert_counts, routers_of(model.get_base_model())
    if counts is None or routers is None:
        state.expert_counts = None
        return
    if [len(layer) for layer in counts] != [routers.experts] * routers.layers or not all(map(sum, counts)):
        raise RunError(
            f"{folder}: its state.json counts the tokens of other experts than this model's {routers.layers} layers "
            f"of {routers.experts} have. Remove this folder to use the one before."
        )
