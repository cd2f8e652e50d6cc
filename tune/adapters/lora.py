"""LoRA as a PEFT adapter: injected with our NF4 layer, initialised by name, saved as a stock PEFT folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tune.errors import ModelError, did_you_mean
from tune.kernels.nf4_linear import nf4_lora_linear
from tune.models.catalog import KINDS, target_suffixes
from tune.models.load import LoadedBase
from tune.recipe import schema

ADAPTER = "default"
"""PEFT's name for the one adapter a run trains."""

_DECODE_TOKENS = 8
"""At most this many tokens without gradients are generation, where bitsandbytes' fused product reads less memory."""


class NF4LoraLinear(PeftLinear4bit):  # type: ignore[misc]
    """PEFT's LoRA layer for a 4-bit linear, computed by our function when exactly one plain adapter is active.

    Everything else (disabled, merged, several adapters, mixed batches, DoRA) is PEFT's own code path.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = len(active) == 1 and active[0] not in self.lora_variant and not self.lora_bias[active[0]]
        decoding = not torch.is_grad_enabled() and x.is_cuda and x.numel() // x.shape[-1] <= _DECODE_TOKENS
        if self.disable_adapters or self.merged or args or kwargs or not plain or decoding:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        name = active[0]
        base = self.get_base_layer()
        dropout = self.lora_dropout[name]
        return nf4_lora_linear(
            x,
            base.weight,
            base.weight.quant_state,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a base by name, without its output head, which stays frozen and in 16 bit."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def resolve_targets(section: schema.Adapter, base: LoadedBase, base_name: str) -> dict[str, int]:
    """Return the rank of every module that the recipe's `adapter` adapts, by full module name.

    Raises:
        ModelError: a target, an exclusion or a rank that names no linear layer of this model.
    """
    known = linears(base.model)
    last_names = sorted({name.rsplit(".", 1)[-1] for name in known})
    if not known:
        raise ModelError(
            f"model.base: {base_name} has no linear layers, so there is nothing to adapt. Check its config.json."
        )

    def find(key: str, suffix: str) -> list[str]:
        found = [name for name in known if _matches(name, suffix)]
        if not found:
            raise ModelError(
                f"adapter.{key}: {suffix!r} names no linear layer of {base_name} that can be adapted."
                f"{did_you_mean(suffix, last_names)} It has: {', '.join(last_names)}."
            )
        return found

    ranks: dict[str, int] = {}
    for target in section.targets:
        for suffix in target_suffixes(target, base.config, base_name):
            ranks.update(dict.fromkeys(find("targets", suffix), section.rank))
    for target, rank in section.ranks.items():
        for suffix in target_suffixes(target, base.config, base_name):
            for name in find("ranks", suffix):
                if name in ranks:
                    ranks[name] = rank
    for excluded in section.exclude:
        suffixes = target_suffixes(excluded, base.config, base_name) if excluded in KINDS else (excluded,)
        for suffix in suffixes:
            for name in find("exclude", suffix):
                ranks.pop(name, None)
    if not ranks:
        raise ModelError("adapter.exclude: leaves nothing of adapter.targets to adapt. Exclude less.")
    return ranks


def attach(base: LoadedBase, section: schema.Adapter, base_name: str, seed: int) -> PeftModel:
    """Inject LoRA into `base.model` (in place) and initialise it; only the adapter requires gradients.

    The start is a function of the seed and each module's name alone, drawn in float32: the storage of the base,
    the order of injection and the device do not change it.
    """
    import bitsandbytes as bnb

    ranks = resolve_targets(section, base, base_name)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=_shortest_suffixes(ranks, base.model),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != section.rank},
        init_lora_weights=False,
        base_model_name_or_path=base_name,
    )
    config._register_custom_module({bnb.nn.Linear4bit: NF4LoraLinear})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that it will drop
        model = get_peft_model(base.model, config, adapter_name=ADAPTER)
    config.init_lora_weights = True
    initialise(model, section, seed)
    return model


def _shortest_suffixes(ranks: dict[str, int], model: nn.Module) -> list[str]:
    """Name the targets as PEFT users do (`q_proj`) where that means the same set, and in full where it does not."""
    last_names = {name.rsplit(".", 1)[-1] for name in ranks}
    if {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in last_names} == set(ranks):
        return sorted(last_names)
    return sorted(ranks)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters by name, in the one order that optimizer and checkpoints use."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def initialise(model: nn.Module, section: schema.Adapter, seed: int) -> None:
    """Draw every A from (seed, module name) in float32 and set every B to zero.

    `default` is PEFT's own: uniform with bound 1/sqrt(in_features) (Kaiming with a = sqrt(5)); `gaussian` is normal
    with standard deviation 1/rank.
    """
    for name, parameter in adapter_parameters(model):
        if ".lora_B." in name:
            parameter.zero_()
            continue
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rank, in_features = parameter.shape
        start = torch.empty(rank, in_features, dtype=torch.float32)
        if section.init == "gaussian":
            start.normal_(0, 1 / rank, generator=generator)
        else:
            bound = 1 / math.sqrt(in_features)
            start.uniform_(-bound, bound, generator=generator)
        parameter.copy_(start)


def adapter_bytes(model: PeftModel) -> bytes:
    """Return the adapter's tensors as a safetensors file, under the names that stock PEFT reads."""
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    return save(tensors, metadata={"format": "pt"})


def adapter_config_text(model: PeftModel) -> str:
    """Return the text of adapter_config.json as stock PEFT writes it."""
    config = model.peft_config[ADAPTER].to_dict()
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def read_adapter(folder: Path, model: PeftModel) -> None:
    """Put the tensors of a PEFT folder into the attached adapter.

    Raises:
        ModelError: the folder is no adapter, holds a pickle, or does not fit the attached adapter.
    """
    config_path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config_path.is_file():
        raise ModelError(f"{folder}: holds no adapter_config.json, so it is not a PEFT adapter. Give a folder that is.")
    if not weights.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        remedy = "The pickled one it holds is never read: save it as safetensors." if pickled else "Copy it again."
        raise ModelError(f"{folder}: holds no adapter_model.safetensors. {remedy}")
    try:
        config = dict(json.loads(config_path.read_text(encoding="utf-8")))
        state = load_file(os.fspath(weights))
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be read ({error}). The copy may be incomplete.") from error
    ours = model.peft_config[ADAPTER]
    for theirs, mine in (("r", "rank"), ("lora_alpha", "alpha")):
        if config.get(theirs) != getattr(ours, theirs):
            raise ModelError(
                f"{folder}: its {theirs} is {config.get(theirs)}, the recipe's adapter.{mine} is "
                f"{getattr(ours, theirs)}. Set adapter.{mine}: {config.get(theirs)} to continue it."
            )
    if config.get("alpha_pattern"):
        raise ModelError(f"{folder}: has alphas of its own for some layers, which this version does not continue.")
    if config.get("use_dora") or config.get("use_rslora") or config.get("modules_to_save"):
        raise ModelError(
            f"{folder}: uses DoRA, rank-stabilised scaling or trained whole modules, which this version does not."
        )
    wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    for words, names in (("lacks", missing), ("has, beyond adapter.targets,", extra), ("has another shape for", wrong)):
        if names:
            raise ModelError(
                f"{folder}: the adapter {words} {len(names)} tensors, such as {names[0]}. "
                "Give the recipe the adapter.targets and ranks that it was trained with."
            )
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)
