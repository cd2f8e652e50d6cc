"""What an adapter adds to each matrix of its base: ΔW = s · B A, in float32."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tune.errors import ModelError

_BEFORE = "base_model.model."

_HARMLESS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "r",
        "lora_alpha",
        "lora_dropout",
        "rank_pattern",
        "use_rslora",
        "bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "qalora_group_size",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ]
)
"""Keys of adapter_config.json that a merge knows, or that only say how an adapter was started or where it is put."""


@dataclass(frozen=True, slots=True)
class Delta:
    """The low-rank change of one linear layer."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix that it changes: [out, in]."""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of ΔW [out, in], in float32."""
        return (self.b_OR[start:stop].float() @ self.a_RI.float()) * self.scaling


def read_deltas(folder: Path) -> dict[str, Delta]:
    """Return the deltas of a PEFT LoRA folder by the name of the module that each changes.

    Raises:
        ModelError: it is no adapter, is damaged, or holds what a merge would lose; each thing by name.
    """
    config = read_adapter_config(folder)
    path = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(f"{path}: the adapter cannot be read ({error}). The copy may be incomplete.") from error
    _refuse_unmergeable(folder, config)
    deltas: dict[str, Delta] = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.weight", ".lora_B.weight")
        if other not in tensors or not name.startswith(_BEFORE):
            raise ModelError(f"{path}: {name} has no {other}. The copy may be incomplete.")
        a_RI, b_OR = tensors.pop(name), tensors.pop(other)
        if a_RI.dim() != 2 or b_OR.dim() != 2 or not 0 < a_RI.shape[0] == b_OR.shape[1]:
            raise ModelError(f"{path}: {name} {list(a_RI.shape)} and {other} {list(b_OR.shape)} do not fit together.")
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise ModelError(f"{path}: {name} or {other} holds NaN or infinity: the training diverged. Merge another.")
        rank = a_RI.shape[0]
        scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
        deltas[name.removeprefix(_BEFORE).removesuffix(".lora_A.weight")] = Delta(a_RI, b_OR, scaling)
    if tensors:
        raise ModelError(
            f"{path}: holds {len(tensors)} tensors that are no LoRA of a linear layer, such as {min(tensors)}. "
            "This version merges LoRA on linear layers."
        )
    if not deltas:
        raise ModelError(f"{path}: holds no LoRA, so there is nothing to merge.")
    return deltas


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json.

    Raises:
        ModelError: there is none, or it is not a LoRA's.
    """
    path = folder / "adapter_config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ModelError(f"{folder}: holds no adapter_config.json, so it is no PEFT adapter. Give a run.") from None
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). The copy may be incomplete.") from error
    if config.get("peft_type") != "LORA" or not isinstance(config.get("lora_alpha"), int | float):
        raise ModelError(f"{path}: is a {config.get('peft_type')} adapter. This version merges LoRA.")
    return config


def _refuse_unmergeable(folder: Path, config: dict[str, Any]) -> None:
    """What a merge would silently leave out or compute otherwise, by its name in adapter_config.json."""
    unmergeable = {
        "use_dora": "DoRA's magnitudes",
        "alpha_pattern": "alphas of single layers",
        "modules_to_save": "whole modules that were trained",
        "lora_bias": "biases of LoRA's own",
        "target_parameters": "LoRA on bare parameters",
        "trainable_token_indices": "trained embeddings of single tokens",
        "fan_in_fan_out": "transposed matrices",
        "layer_replication": "repeated layers",
    }
    found = [f"{key} ({words})" for key, words in unmergeable.items() if config.get(key)]
    # Whatever a newer PEFT adds may change what a layer computes.
    defaults = LoraConfig().to_dict()
    found += [
        key
        for key, value in config.items()
        if value and value != defaults.get(key) and key not in unmergeable and key not in _HARMLESS
    ]
    if config.get("bias", "none") != "none":
        found.append("bias (trained biases of the base)")
    if found:
        raise ModelError(
            f"{folder}: this version does not merge an adapter with {', '.join(found)}. "
            "peft's merge_and_unload may, without a proof."
        )
