"""The two files of a PEFT folder, read."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tune.errors import ModelError

Layout = Literal["stock", "per-expert"]


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
        return "per-expert" if any(re.search(r"\.experts\.\d+\.", name) for name in self.tensors) else "stock"


def read_files(folder: Path) -> AdapterFiles:
    """Read a PEFT folder.

    Raises:
        ModelError: the folder is no adapter, holds a pickle, or is damaged.
    """
    config, weights = read_config_of(folder), folder / "adapter_model.safetensors"
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        remedy = "The pickled one it holds is never read: save it as safetensors." if pickled else "Copy it again."
        raise ModelError(f"{folder}: holds no adapter_model.safetensors. {remedy}")
    try:
        tensors = load_file(os.fspath(weights))
    except (ValueError, OSError, SafetensorError) as error:
        raise ModelError(_unreadable(folder, error)) from error
    return AdapterFiles(folder, config, tensors)


def read_config_of(folder: Path) -> dict[str, Any]:
    """Return the adapter_config.json of a PEFT folder.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ModelError(f"{folder}: holds no adapter_config.json, so it is not a PEFT adapter. Give a folder that is.")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, OSError) as error:
        raise ModelError(_unreadable(folder, error)) from error


def _unreadable(folder: Path, error: Exception) -> str:
    return f"{folder}: the adapter cannot be read ({error}). The copy may be incomplete."


def declared_rank(config: dict[str, Any], name: str) -> int:
    """Return the rank that adapter_config.json gives a module or parameter of this full name."""
    patterns = config.get("rank_pattern") or {}
    return int(patterns.get(get_pattern_key(patterns.keys(), name), config["r"]))
