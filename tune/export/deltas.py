"""What an adapter adds to each matrix of its base: ΔW = s · B A, in float32."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune.adapters.config_file import peft_defaults, read_adapter_config
from tune.adapters.files import WEIGHTS, read_tensors
from tune.errors import ModelError
from tune.models.experts import STACKS
from tune.models.replaced_rows import RowValues

_BEFORE = "base_model.model."
_INSIDE = ".base_layer"
_ROWS = ".token_adapter.trainable_tokens_delta"
_ROUTERS = ("gate", "router")

_HARMLESS = frozenset(
    [
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_parameters",
        "modules_to_save",
        "trainable_token_indices",
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
    """The low-rank change of one matrix."""

    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix that it changes: [out, in]."""
        return self.b_OR.shape[0], self.a_RI.shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return some rows of ΔW [out, in], in float32."""
        return (self.b_OR[start:stop].float() @ self.a_RI.float()) * self.scaling


@dataclass(frozen=True, slots=True)
class StackDelta:
    """The low-rank changes of all experts of a layer, in stock PEFT's layout.

    A's rows are expert-major; B's columns are rank-major, the expert fastest.
    """

    a_QI: Tensor
    """[E·R, in]"""
    b_OQ: Tensor
    """[out, R·E]"""
    scaling: float
    experts: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it changes: [E, out, in]."""
        return self.experts, self.b_OQ.shape[0], self.a_QI.shape[1]

    def expert(self, expert: int, start: int = 0, stop: int | None = None) -> Delta:
        """Return the change of rows `start` to `stop` of one expert."""
        a_ERI = self.a_QI.reshape(self.experts, -1, self.a_QI.shape[1])
        b_ORE = self.b_OQ.reshape(self.b_OQ.shape[0], -1, self.experts)
        return Delta(a_ERI[expert], b_ORE[start:stop, :, expert], self.scaling)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return ΔW [experts, out, in] of some experts, in float32."""
        count = self.b_OQ.shape[0]
        return torch.stack([self.expert(expert).rows(0, count) for expert in range(start, min(stop, self.experts))])


@dataclass(frozen=True, slots=True)
class Replacement:
    """A matrix that trained in full, and takes the old one's place."""

    value: Tensor

    def delta(self, shape: tuple[int, ...]) -> Replacement | None:
        """Return itself; None when it belongs to a parameter of another shape."""
        return self if tuple(self.value.shape) == shape else None


Change = Delta | StackDelta | Replacement | RowValues
"""What a merge does to one stored tensor."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A and B as an adapter file holds them, of one parameter."""

    a: Tensor
    b: Tensor
    alpha: float
    rank_stabilised: bool

    def delta(self, shape: tuple[int, ...]) -> Delta | StackDelta | None:
        """Return what they add to a parameter of this shape; None when they belong to another."""
        experts = shape[0] if len(shape) == 3 else 1
        rank, rest = divmod(self.a.shape[0], experts)
        if rest or not rank:
            return None
        scaling = self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)
        found = StackDelta(self.a, self.b, scaling, experts) if len(shape) == 3 else Delta(self.a, self.b, scaling)
        return found if found.shape == shape else None


def read_pairs(folder: Path) -> dict[str, Pair | Replacement | RowValues]:
    """Return A and B of a PEFT LoRA folder, a whole matrix or rows of one, by the full name of what each changes.

    Raises:
        ModelError: it is no adapter, is damaged, or holds what a merge would lose; each thing by name.
    """
    config = read_adapter_config(folder)
    path = folder / WEIGHTS
    tensors = read_tensors(folder)
    _refuse_unmergeable(folder, config)
    pairs: dict[str, Pair | Replacement | RowValues] = {}
    for name in [name for name in tensors if name.endswith(".lora_A.weight")]:
        other = name.replace(".lora_A.weight", ".lora_B.weight")
        if other not in tensors or not name.startswith(_BEFORE):
            raise ModelError(f"{path}: {name} has no {other}. The copy may be incomplete.")
        a, b = tensors.pop(name), tensors.pop(other)
        if a.dim() != 2 or b.dim() != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise ModelError(
                f"{path}: {name} {list(a.shape)} and {other} {list(b.shape)} do not fit together. "
                "The copy may be incomplete."
            )
        module = name.removeprefix(_BEFORE).removesuffix(".lora_A.weight")
        pairs[_parameter(module, config)] = Pair(a, b, config["lora_alpha"], bool(config.get("use_rslora")))
    for name in [name for name in tensors if _is_saved_whole(name, config)]:
        pairs[name.removeprefix(_BEFORE)] = Replacement(tensors.pop(name).float())
    for name in [name for name in tensors if name.endswith(_ROWS)]:
        pairs[f"{name.removeprefix(_BEFORE).removesuffix(_ROWS)}.weight"] = _rows(path, name, tensors.pop(name), config)
    if tensors:
        raise ModelError(
            f"{path}: holds {len(tensors)} tensors that are no LoRA of a matrix, such as {min(tensors)}. "
            "This version merges LoRA on linear layers, experts and routers."
        )
    _check_rows_are_there(path, pairs, config)
    if not pairs:
        raise ModelError(f"{path}: holds no LoRA, so there is nothing to merge.")
    return pairs


def _rows(path: Path, name: str, values: Tensor, config: dict[str, Any]) -> RowValues:
    """The trained rows that a tensor holds, with the tokens that adapter_config.json gives them."""
    module = name.removeprefix(_BEFORE).removesuffix(_ROWS)
    indices = config.get("trainable_token_indices") or {}
    named = indices if isinstance(indices, dict) else {module: indices}
    ids = next((tokens for key, tokens in named.items() if f".{module}".endswith(f".{key}")), None)
    if ids is None or values.dim() != 2 or len(set(ids)) != len(ids) or len(ids) != len(values):
        raise ModelError(
            f"{path}: {name} {list(values.shape)} does not fit the tokens that trainable_token_indices of its "
            f"adapter_config.json names ({'none' if ids is None else len(ids)}). The copy may be incomplete."
        )
    return RowValues(tuple(int(token) for token in ids), values.float())


def _check_rows_are_there(path: Path, pairs: Mapping[str, object], config: dict[str, Any]) -> None:
    """Refuse an adapter without the rows of a module that trainable_token_indices names."""
    held = [name.removesuffix(".weight") for name, pair in pairs.items() if isinstance(pair, RowValues)]
    indices = config.get("trainable_token_indices") or {}
    named = indices if isinstance(indices, dict) else {"": indices}  # a list is for the embedding, whatever its name
    for key, tokens in named.items():
        if not any(f".{module}".endswith(f".{key}" if key else "") for module in held):
            raise ModelError(
                f"{path}: holds no rows for the {len(tokens)} tokens that trainable_token_indices of its "
                f"adapter_config.json names{' in ' + key if key else ''}. The copy may be incomplete."
            )


def _is_saved_whole(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor is the weight of a module that `modules_to_save` names."""
    module = name.removesuffix(".weight")
    return module != name and any(f".{module}".endswith(f".{saved}") for saved in config.get("modules_to_save") or ())


def _parameter(module: str, config: dict[str, Any]) -> str:
    """The full name of the parameter that a LoRA belongs to, from where its tensors lie.

    A LoRA on bare parameters lies at their module; of two on one module, gate_up_proj's lies inside the other's.
    """
    targets = config.get("target_parameters") or ()
    if module.endswith(_INSIDE):
        return f"{module.removesuffix(_INSIDE)}.{STACKS[0]}"
    bare = [p for p in (*STACKS, "weight") if any(f".{module}.{p}".endswith(f".{target}") for target in targets)]
    return f"{module}.{bare[-1] if bare else 'weight'}"


def _refuse_unmergeable(folder: Path, config: dict[str, Any]) -> None:
    """What a merge would silently leave out or compute otherwise, by its name in adapter_config.json."""
    unmergeable = {
        "use_dora": "DoRA's magnitudes",
        "alpha_pattern": "alphas of single layers",
        "lora_bias": "biases of LoRA's own",
        "fan_in_fan_out": "transposed matrices",
        "layer_replication": "repeated layers",
    }
    found = [f"{key} ({words})" for key, words in unmergeable.items() if config.get(key)]
    whole = [name for name in config.get("modules_to_save") or () if name.rpartition(".")[2] not in _ROUTERS]
    if whole:
        found.append(f"modules_to_save ({', '.join(whole)}: whole modules that are no routers)")
    defaults = peft_defaults()
    # Whatever a newer PEFT adds may change what a layer computes.
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
