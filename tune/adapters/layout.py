"""The two layouts of an adapter on experts, and how one becomes the other without loss.

Stock PEFT's, which transformers 5 needs, keeps one A and one B for all experts of a layer and a stack:

    …mlp.experts.base_layer.lora_{A,B}     gate_up_proj [E, 2I, H]      A [E·R, in], rows expert-major
    …mlp.experts.lora_{A,B}                down_proj [E, H, I]          B [out, R·E], columns rank-major, expert fastest

A single stack sits at `…mlp.experts.lora_*` whichever it is; adapter_config.json's target_parameters says which.

Per-expert, which servers and transformers 4 read, has an A and a B for each expert's w1 (gate), w3 (up) and w2 (down):

    …block_sparse_moe.experts.N.w1.lora_{A,B}      A [R, in]      B [out, R]

w1 and w3 share the A of gate_up_proj, and each has its half of B's rows: the same function, and back again the same
bytes. A per-expert adapter that was trained as such has different A for w1 and w3; it becomes a stack of twice the
rank, A one above the other and B block-diagonal, doubled since PEFT divides alpha by the rank.

Readers of the per-expert layout want all three of an expert, so a stack that is not adapted is written as zeros, and
zeros are left out on the way back.

Shapes: E experts, R rank, I intermediate, H hidden.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tune.adapters.files import AdapterFiles, Shapes, read_files
from tune.adapters.patterns import Ranks
from tune.errors import ModelError
from tune.models.catalog import EXPERTS, ROUTER, ExpertNames, Family

_PREFIX = "base_model.model."
_GATE_UP, _DOWN = EXPERTS
_STACKED = re.compile(r"(.*\.mlp)\.experts((?:\.base_layer)?)\.lora_A\.weight")
_ROUTER = re.compile(r"(.*\.mlp)\.gate\.lora_A\.weight")


def read_as_stock(
    folder: Path, family: Family | None, fits: Callable[[dict[str, Any], Shapes], None] | None = None
) -> AdapterFiles:
    """Read a PEFT folder of either layout, for a base of `family`, as stock PEFT's; `fits` is `read_files`'s.

    Raises:
        ModelError: as `read_files`, or it is per-expert and does not fit together.
    """
    files = read_files(folder, fits)
    if files.layout == "stock":
        return files
    return to_stock(files, expert_names(family, folder))


def expert_names(family: Family | None, folder: Path) -> ExpertNames:
    """Return what the parts of one expert are called in `family`.

    Raises:
        ModelError: it is no mixture of experts that is known.
    """
    if family is None or family.per_expert is None:
        raise ModelError(
            f"{folder}: the layout with every expert apart is not known for this base, which is "
            f"{'of an unknown family' if family is None else family.name}. It is for a mixture of experts, such as "
            "mistralai/Mixtral-8x7B-v0.1."
        )
    return family.per_expert


def to_per_expert(files: AdapterFiles, names: ExpertNames) -> AdapterFiles:
    """Return an adapter of stock PEFT's layout with every expert apart.

    Raises:
        ModelError: it has no experts, or something that the other layout cannot hold; by name.
    """
    _refuse_unconvertible(files)
    tensors = dict(files.tensors)
    stacks = _take_stacks(files, tensors)
    if not stacks:
        raise ModelError(
            f"{files.folder}: adapts no experts, so there is only one layout. Servers read it as it is, in adapter/."
        )
    routers = [match[1] for name in tensors if (match := _ROUTER.fullmatch(name))]
    config = _config_per_expert(files.config, stacks, routers, names)
    for block in routers:
        for half in ("lora_A", "lora_B"):
            old = f"{block}.gate.{half}.weight"
            tensors[f"{_renamed(block, names)}.gate.{half}.weight"] = tensors.pop(old)
    for block in dict.fromkeys(block for block, _ in stacks):
        gate_up, down = stacks.get((block, _GATE_UP)), stacks.get((block, _DOWN))
        gate_up = gate_up or _no_gate_up(stacks[block, _DOWN])
        down = down or _no_down(gate_up)
        for expert in range(len(gate_up.a_ERI)):
            gate_OR, up_OR = gate_up.b_EOR[expert].chunk(2)
            parts = {
                names.gate: (gate_up.a_ERI[expert], gate_OR),
                names.up: (gate_up.a_ERI[expert], up_OR),
                names.down: (down.a_ERI[expert], down.b_EOR[expert]),
            }
            for part, (a_RI, b_OR) in parts.items():
                owner = f"{_renamed(block, names)}.experts.{expert}.{part}"
                tensors[f"{owner}.lora_A.weight"] = a_RI.clone()
                tensors[f"{owner}.lora_B.weight"] = b_OR.clone(memory_format=torch.contiguous_format)
    return AdapterFiles(files.folder, config, tensors)


def to_stock(files: AdapterFiles, names: ExpertNames) -> AdapterFiles:
    """Return an adapter that has every expert apart in stock PEFT's layout.

    Raises:
        ModelError: experts or parts of them are missing, or do not fit together.
    """
    _refuse_unconvertible(files)
    tensors = dict(files.tensors)
    # Both names of the block occur: transformers 5 would save mlp where transformers 4 read block_sparse_moe.
    block = rf"({re.escape(_PREFIX)}.*)\.(?:{names.block}|mlp)"
    one = re.compile(rf"{block}\.experts\.(\d+)\.({names.gate}|{names.up}|{names.down})\.lora_([AB])\.weight")
    gate = re.compile(rf"{block}\.gate\.lora_([AB])\.weight")
    parts: dict[str, dict[tuple[int, str, str], Tensor]] = {}
    routers = set()
    for name in files.tensors:
        if match := one.fullmatch(name):
            parts.setdefault(match[1] + ".mlp", {})[int(match[2]), match[3], match[4]] = tensors.pop(name)
        elif match := gate.fullmatch(name):
            tensors[f"{match[1]}.mlp.gate.lora_{match[2]}.weight"] = tensors.pop(name)
            routers.add(match[1] + ".mlp")
    stacks: dict[tuple[str, str], _Stack] = {}
    for owner, found in parts.items():
        for stack, both in _joined(files, owner, found, names).items():
            if both.a_ERI.any() or both.b_EOR.any():
                stacks[owner, stack] = both
    for (owner, stack), both in stacks.items():
        inner = ".base_layer" if stack == _GATE_UP and (owner, _DOWN) in stacks else ""
        a_ERI, b_EOR = both.a_ERI, both.b_EOR
        tensors[f"{owner}.experts{inner}.lora_A.weight"] = a_ERI.flatten(0, 1)
        tensors[f"{owner}.experts{inner}.lora_B.weight"] = b_EOR.permute(1, 2, 0).flatten(1, 2).contiguous()
    return AdapterFiles(files.folder, _config_stock(files.config, stacks, routers, tensors, names), tensors)


@dataclass(frozen=True, slots=True)
class _Stack:
    """The LoRA of one stack of experts, expert by expert."""

    a_ERI: Tensor
    b_EOR: Tensor


def _no_down(gate_up: _Stack) -> _Stack:
    """The LoRA, all zeros, of down [H, I] beside one of gate_up [2I, H]."""
    count, rank, hidden = gate_up.a_ERI.shape
    intermediate = gate_up.b_EOR.shape[1] // 2
    return _Stack(gate_up.a_ERI.new_zeros(count, rank, intermediate), gate_up.b_EOR.new_zeros(count, hidden, rank))


def _no_gate_up(down: _Stack) -> _Stack:
    """The LoRA, all zeros, of gate_up [2I, H] beside one of down [H, I]."""
    count, rank, intermediate = down.a_ERI.shape
    hidden = down.b_EOR.shape[1]
    return _Stack(down.a_ERI.new_zeros(count, rank, hidden), down.b_EOR.new_zeros(count, 2 * intermediate, rank))


def _take_stacks(files: AdapterFiles, tensors: dict[str, Tensor]) -> dict[tuple[str, str], _Stack]:
    """Move the stacks out of `tensors`: by block, such as `base_model.model.model.layers.0.mlp`, and stack."""
    stacks, ranks = {}, Ranks(files.config)
    for name in files.tensors:
        match = _STACKED.fullmatch(name)
        if match is None:
            continue
        block, inner = match.groups()
        nested = f"{block}.experts.base_layer.lora_A.weight" in files.tensors
        stack = _GATE_UP if inner else _DOWN if nested else _only_target(files, block)
        rank = ranks.of(f"{block.removeprefix(_PREFIX)}.{stack}")
        a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
        if b is None or rank < 1 or a.shape[0] % rank or b.shape[1] != a.shape[0] or (b.shape[0] % 2 and inner):
            raise ModelError(
                f"{files.folder}: {name} {list(a.shape)} does not fit its rank of {rank} or the lora_B beside it "
                f"({'missing' if b is None else list(b.shape)}). The copy may be incomplete."
            )
        count = a.shape[0] // rank
        stacks[block, stack] = _Stack(a.view(count, rank, -1), b.view(-1, rank, count).permute(2, 0, 1))
    return stacks


def _only_target(files: AdapterFiles, block: str) -> str:
    """Which stack the only LoRA of a block's experts is on."""
    targets = files.config.get("target_parameters") or ()
    for stack in EXPERTS:
        name = f"{block.removeprefix(_PREFIX)}.{stack}"
        if any(name == target or name.endswith(f".{target}") for target in targets):
            return stack
    raise ModelError(
        f"{files.folder}: adapts the experts of {block.removeprefix(_PREFIX)}, and target_parameters of its "
        "adapter_config.json does not say which of their weights. Put the file back that was saved with it."
    )


def _joined(
    files: AdapterFiles, owner: str, found: dict[tuple[int, str, str], Tensor], names: ExpertNames
) -> dict[str, _Stack]:
    """Stack the parts of one block's experts, gate and up as one."""
    count = 1 + max(expert for expert, _, _ in found)
    if count > len(found):  # a number made up, for which the list of what is missing would have no end
        raise ModelError(
            f"{files.folder}: holds {len(found)} tensors of the experts of {owner.removeprefix(_PREFIX)}, the last of "
            f"which is number {count - 1}. The copy may be incomplete."
        )
    present = {part for _, part, _ in found}
    missing = [
        f"{owner.removeprefix(_PREFIX)}.experts.{expert}.{part}.lora_{half}"
        for expert in range(count)
        for part in sorted(present | ({names.gate, names.up} if present & {names.gate, names.up} else set()))
        for half in "AB"
        if (expert, part, half) not in found
    ]
    if missing:
        raise ModelError(
            f"{files.folder}: lacks {len(missing)} tensors of experts, such as {missing[0]}. The copy may be "
            "incomplete, or its target_modules left some out, which stacked experts cannot."
        )

    def stacked(part: str, half: str) -> Tensor:
        return torch.stack([found[expert, part, half] for expert in range(count)])

    try:
        stacks = {}
        if names.down in present:
            stacks[_DOWN] = _Stack(stacked(names.down, "A"), stacked(names.down, "B"))
        if names.gate in present:
            gate_a, up_a = stacked(names.gate, "A"), stacked(names.up, "A")
            gate_b, up_b = stacked(names.gate, "B"), stacked(names.up, "B")
            if torch.equal(gate_a, up_a):
                stacks[_GATE_UP] = _Stack(gate_a, torch.cat([gate_b, up_b], 1))
            else:
                _refuse_rank_stabilised(files)
                blocks = [torch.block_diag(*pair) for pair in zip(gate_b, up_b, strict=True)]  # type: ignore[no-untyped-call]
                stacks[_GATE_UP] = _Stack(torch.cat([gate_a, up_a], 1), 2 * torch.stack(blocks))
    except RuntimeError as error:
        raise ModelError(
            f"{files.folder}: the experts of {owner.removeprefix(_PREFIX)} have A or B of different shapes ({error}). "
            "Stacked experts need one rank for all."
        ) from error
    return stacks


def _renamed(block: str, names: ExpertNames) -> str:
    return block.removesuffix("mlp") + names.block


def _config_per_expert(
    config: dict[str, Any], stacks: dict[tuple[str, str], _Stack], routers: Iterable[str], names: ExpertNames
) -> dict[str, Any]:
    """adapter_config.json of the per-expert layout.

    A stack of another rank than `r` needs patterns, under the names of its linear layers for those who have them, and
    under the stack's for PEFT, which makes one stack of twice the rank and twice the alpha from w1 and w3.
    """
    rank_pattern = {key: rank for key, rank in (config.get("rank_pattern") or {}).items() if not _is_bare(key)}
    alpha_pattern: dict[str, float] = {}
    rank, alpha, stabilised = config["r"], config["lora_alpha"], config.get("use_rslora")
    for (block, stack), both in stacks.items():
        own, plain = both.a_ERI.shape[1], block.removeprefix(_PREFIX)
        twice = 2 if stack == _GATE_UP else 1
        if own != rank:
            parts = f"({names.gate}|{names.up})" if stack == _GATE_UP else names.down
            rank_pattern[rf"{re.escape(_renamed(plain, names))}\.experts\.\d+\.{parts}"] = own
        if own != rank or (stabilised and twice == 2):
            rank_pattern[f"{plain}.{stack}"] = twice * own
            alpha_pattern[f"{plain}.{stack}"] = alpha * (math.sqrt(twice) if stabilised else twice)
    ranks = Ranks(config)
    for block in routers:
        plain = block.removeprefix(_PREFIX)
        own = ranks.of(f"{plain}.gate.weight")
        if own != rank:
            rank_pattern |= {f"{plain}.gate.weight": own, f"{re.escape(_renamed(plain, names))}.gate": own}
    targets = [*(config.get("target_modules") or ()), names.gate, names.up, names.down]
    return {
        **config,
        "target_modules": sorted(targets + (["gate"] if routers else [])),
        "target_parameters": None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }


def _config_stock(
    config: dict[str, Any],
    stacks: dict[tuple[str, str], _Stack],
    routers: Iterable[str],
    tensors: dict[str, Tensor],
    names: ExpertNames,
) -> dict[str, Any]:
    """adapter_config.json of stock PEFT's layout."""
    rank_pattern = {key: rank for key, rank in (config.get("rank_pattern") or {}).items() if not _is_bare(key)}
    alpha = {key: value for key, value in (config.get("alpha_pattern") or {}).items() if not _is_bare(key)}
    bare = {f"{block.removeprefix(_PREFIX)}.{stack}": both.a_ERI.shape[1] for (block, stack), both in stacks.items()}
    bare |= {
        f"{block.removeprefix(_PREFIX)}.gate.weight": len(tensors[f"{block}.gate.lora_A.weight"]) for block in routers
    }
    rank_pattern |= {name: rank for name, rank in bare.items() if rank != config["r"]}
    # In short where every layer that is adapted at all has it, in full where it would reach others as well.
    layers = {match[1] for name in tensors if (match := re.match(r"(.*?\.layers\.\d+)\.", name))}
    targets: list[str] = []
    for suffix in (*EXPERTS, *ROUTER):
        found = [name for name in bare if name.endswith(f".{suffix}")]
        targets += [suffix] if len(found) == len(layers) else found
    apart = {names.gate, names.up, names.down, *(("gate",) if routers else ())}
    return {
        **config,
        "target_modules": sorted(set(config.get("target_modules") or ()) - apart),
        "target_parameters": sorted(targets),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha,
    }


def _is_bare(pattern: str) -> bool:
    """Whether a pattern of ranks or alphas is for experts or a router, in either layout."""
    return re.search(r"experts|gate(\.weight)?$", pattern.replace("\\", "")) is not None


def _refuse_unconvertible(files: AdapterFiles) -> None:
    """What would be lost, by its name in adapter_config.json."""
    lost = {
        "use_dora": "DoRA's magnitudes",
        "modules_to_save": "modules that were trained whole, which no server reads: use `tune merge`",
        "lora_bias": "biases of LoRA's own",
    }
    found = [f"{key} ({words})" for key, words in lost.items() if files.config.get(key)]
    if not isinstance(files.config.get("r"), int) or not isinstance(files.config.get("lora_alpha"), int | float):
        found.append(f"peft_type {files.config.get('peft_type')}, which is no LoRA")
    if any(not _is_bare(key) for key in files.config.get("alpha_pattern") or ()):
        found.append("alpha_pattern (alphas of single layers)")
    if found:
        raise ModelError(f"{files.folder}: its layout is not converted. It has {'; '.join(found)}.")


def _refuse_rank_stabilised(files: AdapterFiles) -> None:
    if files.config.get("use_rslora"):
        raise ModelError(
            f"{files.folder}: has different A for the gate and up of an expert and rank-stabilised scaling "
            "(use_rslora), which no stack of whole numbers is equal to. PEFT itself may load it, inexactly."
        )
