"""Whether an adapter's files are those of the adapter that is attached, told before a tensor of them is read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from tune.adapters import token_rows
from tune.adapters.config_file import set_keys
from tune.adapters.files import Shapes, read_config_of, read_shapes
from tune.adapters.patterns import Ranks
from tune.errors import ModelError


def check_claimed(folder: Path, claimed: Mapping[str, int], linears: Iterable[str]) -> None:
    """Refuse, before it is attached, an adapter that a recipe says to be larger than its file.

    The recipe of somebody else's run can ask for more than the memory holds.

    Args:
        folder: the adapter.
        claimed: from `resolve_targets`.
        linears: the names among them that are linear layers; experts and routers may be laid out in other ways.

    Raises:
        ModelError: it is larger, or lacks a layer.
    """
    config, shapes = read_config_of(folder), read_shapes(folder)
    for name in linears:
        found = shapes.get(f"base_model.model.{name}.lora_A.weight")
        if found is None:
            raise ModelError(
                f"{folder}: the adapter lacks the tensors of {name}. Give the recipe the adapter.targets and ranks "
                "that it was trained with."
            )
        if found[:1] < (claimed[name],):
            said = config.get("r") if config.get("r") != claimed[name] else f"{found[0]} for {name}"
            raise ModelError(
                f"{folder}: its r is {said}, the recipe's adapter.rank is {claimed[name]}. "
                f"Set adapter.rank: {config.get('r')} to continue it."
            )


def refuse_others(folder: Path, config: dict[str, Any], ours: LoraConfig) -> None:
    """Refuse an adapter that computes something else than ours does.

    Raises:
        ModelError: says by what.
    """
    if config.get("alpha_pattern"):
        raise ModelError(f"{folder}: has alphas of its own for some layers, which this version does not continue.")
    if config.get("use_dora"):
        raise ModelError(f"{folder}: uses DoRA, which this version does not.")
    others = [key for key in ("fan_in_fan_out", "lora_bias", "layer_replication", "use_qalora") if config.get(key)]
    others += ["bias"] if config.get("bias") not in (None, "none") else []
    if others := [*others, *set_keys(config)]:
        raise ModelError(f"{folder}: uses {', '.join(others)}, which this version does not. Give another adapter.")
    if bool(config.get("use_rslora")) != ours.use_rslora:
        raise ModelError(
            f"{folder}: its use_rslora is {json.dumps(bool(config.get('use_rslora')))}. "
            f"Set adapter.rslora: {json.dumps(not ours.use_rslora)} to continue it."
        )
    if config.get("modules_to_save") and not ours.modules_to_save:
        raise ModelError(
            f"{folder}: holds modules that were trained whole ({', '.join(sorted(config['modules_to_save']))}), which "
            "the recipe does not train so. A router's is continued with router.train: full."
        )
    token_rows.check_same(folder, config, ours.trainable_token_indices)


def check_shapes(
    folder: Path, config: dict[str, Any], shapes: Shapes, wanted: Shapes, ours: LoraConfig, ranks: Mapping[str, int]
) -> None:
    """Refuse tensors that are not those of the attached adapter.

    Args:
        folder: the adapter's, for messages.
        config: its adapter_config.json.
        shapes: of its tensors, by name.
        wanted: of the attached adapter's.
        ours: the attached adapter's configuration.
        ranks: of every layer that is adapted, by its full name.

    Raises:
        ModelError: names the first that differs, and the key of the recipe.
    """
    missing, extra = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & shapes.keys() if wanted[name] != shapes[name])
    differs = [] if config.get("lora_alpha") == ours.lora_alpha else [("lora_alpha", "alpha")]
    if config.get("r") != ours.r and (wrong or not _gives(config, ranks)):
        differs.insert(0, ("r", "rank"))
    for theirs, mine in differs:
        raise ModelError(
            f"{folder}: its {theirs} is {config.get(theirs)}, the recipe's adapter.{mine} is "
            f"{getattr(ours, theirs)}. Set adapter.{mine}: {config.get(theirs)} to continue it."
        )
    for words, names in (("lacks", missing), ("has, beyond adapter.targets,", extra), ("has another shape for", wrong)):
        if names:
            raise ModelError(
                f"{folder}: the adapter {words} {len(names)} tensors, such as {names[0]}. "
                "Give the recipe the adapter.targets and ranks that it was trained with."
            )


def _gives(config: dict[str, Any], ranks: Mapping[str, int]) -> bool:
    """Whether adapter_config.json gives every layer this rank."""
    if config.get("r") is None:
        return False
    theirs = Ranks(config)
    return all(theirs.of(name) == rank for name, rank in ranks.items())
