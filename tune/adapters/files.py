"""The two files of a PEFT folder, read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tune.adapters.config_file import read_adapter_config, unknown_keys
from tune.errors import ModelError
from tune.files.foreign import followed
from tune.files.pickles import pickles_in, refuse_disguised
from tune.models.shards import DTYPES, read_header
from tune.recipe.read import shown

Layout = Literal["stock", "per-expert"]

WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,511}")
"""The name of a tensor: module names with dots between."""


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """What a PEFT folder holds."""

    folder: Path
    config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, Tensor]

    @property
    def layout(self) -> Layout:
        """In which of the two its experts are; stock where there are none."""
        return layout_of(self.tensors)


Shapes = dict[str, tuple[int, ...]]


def layout_of(names: Shapes | dict[str, Tensor]) -> Layout:
    """In which of the two layouts of experts tensors of these names are; stock where there are none."""
    return "per-expert" if any(re.search(r"\.experts\.\d+\.", name) for name in names) else "stock"


def read_files(folder: Path, fits: Callable[[dict[str, Any], Shapes], None] | None = None) -> AdapterFiles:
    """Read a PEFT folder.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        fits: called with the config and the shapes of the tensors before any of them is read, so that it can refuse
            them.

    Raises:
        ModelError: the folder is no adapter, holds a pickle, is damaged, or holds NaN or what only a newer PEFT knows.
    """
    config = read_config_of(folder)
    shapes = read_shapes(folder)
    for name, shape in shapes.items():
        if name.endswith((".lora_A.weight", ".lora_B.weight")) and (len(shape) != 2 or 0 in shape):
            raise ModelError(f"{folder / WEIGHTS}: {name} {list(shape)} is no A or B of a LoRA. Copy it again.")
    if fits is not None:
        fits(config, shapes)
    return AdapterFiles(folder, config, read_tensors(folder))


def read_config_of(folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json of a PEFT folder.

    Raises:
        ModelError: there is none, it is damaged, or it is not a LoRA's that this version knows.
    """
    config = read_adapter_config(folder)
    if unknown := unknown_keys(config):
        raise ModelError(
            f"{folder / 'adapter_config.json'}: {shown(unknown[0])}: is not known here ({shown(config[unknown[0]])}), "
            "and may change what the adapter computes. Take it out only if it does not, or use a newer version."
        )
    return config


def weights_of(folder: Path) -> Path:
    """Return where the weights of a PEFT folder lie.

    Raises:
        ModelError: there are none, or they are something else than a file of their own.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = [name for name in pickles_in(folder) if name.startswith("adapter_model")]
        remedy = (
            f"The pickled one it holds ({pickled[0]}) is never read, since that can run code: save it as safetensors."
            if pickled
            else "Copy it again."
        )
        raise ModelError(f"{folder}: holds no {WEIGHTS}. {remedy}")
    try:
        return followed(path)
    except (OSError, ValueError) as error:
        raise ModelError(_unreadable(folder, error)) from error


def read_shapes(folder: Path) -> Shapes:
    """Return the shapes of the tensors of a PEFT folder by name, of which nothing else is read.

    Raises:
        ModelError: the file is damaged, or holds what no adapter's does.
    """
    path = weights_of(folder)
    refuse_disguised(path, str(folder / WEIGHTS))
    try:
        places = read_header(path)[1]
    except ModelError as error:
        raise ModelError(_unreadable(folder, error)) from error
    for name, place in places.items():
        if not _TENSOR.fullmatch(name) or ".." in name:
            raise ModelError(f"{folder / WEIGHTS}: holds a tensor whose name is no module's ({shown(name)}).")
        if place.dtype not in DTYPES:
            raise ModelError(
                f"{folder / WEIGHTS}: {name} is of type {shown(place.dtype)}. An adapter is in float32, bfloat16 or "
                "float16."
            )
    return {name: place.shape for name, place in places.items()}


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a PEFT folder by name.

    Raises:
        ModelError: the file is damaged, or a tensor holds NaN or infinity.
    """
    read_shapes(folder)
    try:
        tensors = load_file(os.fspath(weights_of(folder)))
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(_unreadable(folder, error)) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ModelError(
                f"{folder / WEIGHTS}: {name} holds NaN or infinity: the training diverged, or the file is damaged. "
                "Use another adapter or checkpoint."
            )
    return tensors


def _unreadable(folder: Path, error: Exception) -> str:
    words, _, _ = str(error).partition(". The download or copy may be incomplete")
    return f"{folder}: the adapter cannot be read ({words}). The copy may be incomplete."
