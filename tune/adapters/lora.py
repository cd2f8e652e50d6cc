"""LoRA as a PEFT adapter: injected with our NF4 layer, initialised by name, saved as a stock PEFT folder."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from safetensors.torch import save
from torch import Tensor, nn

from tune.adapters import expert_lora, router, token_rows
from tune.adapters.files import Shapes, layout_of
from tune.adapters.fitting import check_shapes, refuse_others
from tune.adapters.layout import read_as_stock
from tune.errors import ModelError, did_you_mean
from tune.kernels.nf4_linear import nf4_lora_linear
from tune.models.catalog import KINDS, family_of, target_suffixes
from tune.models.experts import NF4Experts
from tune.models.load import LoadedBase
from tune.models.sharding import quant_state_of
from tune.recipe import schema

ADAPTER = "default"
"""PEFT's name for the one adapter a run trains."""

IN_FULL = 0
"""In the place of a rank: the weight itself trains."""

_DECODE_TOKENS = 8
"""At most this many tokens without gradients are generation, where bitsandbytes' fused product reads less memory."""


class NF4LoraLinear(PeftLinear4bit):  # type: ignore[misc]
    """PEFT's LoRA layer for a 4-bit linear, computed by our function when exactly one plain adapter is active.

    Everything else (disabled, merged, several adapters, mixed batches, DoRA) is PEFT's own code path.
    """

    merges = True
    """Whether PEFT may merge it in memory. Not in a model whose experts it may not: it would be left half merged."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does.

        Raises:
            ModelError: experts or a router are adapted in this model.
        """
        if not self.merges:
            raise ModelError(expert_lora.MERGE_REFUSED)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

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
            quant_state_of(base),
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
            dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
        )


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a base by name, without its output head, which stays frozen and in 16 bit."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = token_rows.unwrapped(get_head()) if get_head is not None else None
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def _matches(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def resolve_targets(
    section: schema.Adapter, base: LoadedBase, base_name: str, router_section: schema.Router | None = None
) -> dict[str, int]:
    """Return the rank of everything that the recipe's `adapter` adapts, by full name.

    A linear layer goes by its module's name; the experts' stacks and a router's weight go by their parameter's. A
    router that trains in full, as the recipe's `router` may ask, has the rank `IN_FULL`.

    Raises:
        ModelError: a target, an exclusion or a rank that names nothing of this model that can be adapted.
    """
    modules = linears(base.model)
    stacks = set(expert_lora.expert_parameters(base.model))
    routers = {f"{name}.weight" for name in router.routers(base.model)}
    bare = stacks | routers
    known = [*modules, *sorted(bare)]
    last_names = sorted({name.rsplit(".", 1)[-1] for name in (*modules, *stacks)} | ({"router"} if routers else set()))
    what = "linear layer, experts or router" if bare else "linear layer"
    if not modules:
        raise ModelError(
            f"model.base: {base_name} has no linear layers, so there is nothing to adapt. Check its config.json."
        )

    def find(key: str, suffix: str) -> list[str]:
        found = [name for name in known if _matches(name, suffix)]
        found += [name for name in bare if _matches(name.rpartition(".")[0], suffix)]
        if not found:
            raise ModelError(
                f"adapter.{key}: {suffix!r} names no {what} of {base_name} that can be adapted."
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
    _check_routers(section, base_name, routers, ranks, router_section)
    _check_ranks(base.model, base_name, ranks)
    if router_section is not None and router_section.train == "full":
        ranks.update(dict.fromkeys(sorted(routers), IN_FULL))
    return ranks


def _check_ranks(model: nn.Module, base_name: str, ranks: dict[str, int]) -> None:
    """Refuse a rank that B A cannot have: it takes memory, as much as there is, and adds nothing."""
    stacks = expert_lora.expert_parameters(model)
    for name, rank in ranks.items():
        last = name.rpartition(".")[2]
        module = stacks.get(name) or model.get_submodule(name.removesuffix(".weight"))
        if name not in stacks and isinstance(module, nn.Linear):
            size: Sequence[int] = (module.out_features, module.in_features)
        elif isinstance(module, NF4Experts):
            size = module.shape_of(last)[1:]
        else:
            size = getattr(module, last).shape[-2:]
        if rank > max(size):
            raise ModelError(
                f"adapter.rank: {rank} is more than {name} of {base_name} {list(size)} has rows or columns. "
                "Lower it, or that of adapter.ranks."
            )


def _check_routers(
    section: schema.Adapter, base_name: str, routers: set[str], ranks: dict[str, int], asked: schema.Router | None
) -> None:
    full = asked is not None and asked.train == "full"
    adapted = sorted(routers & ranks.keys())
    if full and not routers:
        raise ModelError(f"router.train: full: {base_name} has no router. Write frozen, or leave it out.")
    if full and adapted:
        raise ModelError(
            f"router.train: full trains {adapted[0]}, and adapter.targets puts a LoRA on it as well. Choose one."
        )
    if section.dropout and adapted:
        raise ModelError(
            f"adapter.dropout: does not reach the LoRA on a router ({section.dropout}; {adapted[0]}). Set it to 0, or "
            "take the router out of adapter.targets; router.train: full trains it without LoRA."
        )


def attach(
    base: LoadedBase,
    section: schema.Adapter,
    base_name: str,
    seed: int,
    router_section: schema.Router | None = None,
    added: Sequence[int] = (),
) -> PeftModel:
    """Inject LoRA into `base.model` (in place) and initialise it; only the adapter requires gradients.

    The start is a function of the seed and each module's name alone, drawn in float32: the storage of the base,
    the order of injection and the device do not change it. A router that trains in full starts as it is, and so do
    the rows of the tokens `added`, which `grow_vocabulary` has made.
    """
    claimed = resolve_targets(section, base, base_name, router_section)
    ranks = {name: rank for name, rank in claimed.items() if rank != IN_FULL}
    modules = linears(base.model).keys()
    everything = [*(name for name, _ in base.model.named_modules()), *(n for n, _ in base.model.named_parameters())]
    bare = [name for name in ranks if name not in modules]
    in_full = [name.rpartition(".")[0] for name, rank in claimed.items() if rank == IN_FULL]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        use_rslora=section.rslora,
        target_modules=_shortest_suffixes([name for name in ranks if name in modules], everything, parts=1),
        target_parameters=_shortest_suffixes(bare, everything, parts=2) or None,
        modules_to_save=_shortest_suffixes(in_full, everything, parts=2) or None,
        trainable_token_indices=token_rows.targets(base.model, added),
        rank_pattern={name: rank for name, rank in ranks.items() if rank != section.rank},
        init_lora_weights=False,
        base_model_name_or_path=base_name,
    )
    register(config, base.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a name that it will drop
        warnings.filterwarnings("ignore", "The following rank_pattern keys")  # it looks among modules alone
        model = get_peft_model(base.model, config, adapter_name=ADAPTER)
    config.init_lora_weights = True
    router.train_in_full(base.model, ADAPTER)
    token_rows.train_rows(base.model, ADAPTER)
    if bare or in_full:
        for module in base.model.modules():
            if isinstance(module, NF4LoraLinear):
                module.merges = False
    if bare:
        # Stock PEFT refuses to load an adapter with parameters and dropout. The layers have theirs by now.
        config.lora_dropout = 0.0
    initialise(model, section, seed)
    return model


def register(config: LoraConfig, model: nn.Module) -> None:
    """Tell PEFT of our layers for what `model` holds. It does not save this, so each config of ours is told again."""
    import bitsandbytes as bnb

    mapping: dict[type[nn.Module], type[nn.Module]] = {bnb.nn.Linear4bit: NF4LoraLinear}
    mapping |= {type(module): expert_lora.ParamWrapper for module in expert_lora.expert_parameters(model).values()}
    mapping |= {type(module): router.ParamWrapper for module in router.routers(model).values()}
    config._register_custom_module(mapping)


def _shortest_suffixes(wanted: list[str], everything: list[str], parts: int) -> list[str]:
    """Name targets as PEFT users do (`q_proj`) where that means the same set, and in full where it does not."""
    short = {".".join(name.split(".")[-parts:]) for name in wanted}
    if {name for name in everything if any(_matches(name, suffix) for suffix in short)} == set(wanted):
        return sorted(short)
    return sorted(wanted)


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the trained parameters by name, in the one order that optimizer and checkpoints use."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def initialise(model: nn.Module, section: schema.Adapter, seed: int) -> None:
    """Draw every A from (seed, module name) in float32 and set every B to zero.

    `default` is PEFT's own: uniform with bound 1/sqrt(in_features) (Kaiming with a = sqrt(5)); `gaussian` is normal
    with standard deviation 1/rank. The A of a stack of experts goes by the stack's name, wherever PEFT nests it.
    """
    wrappers = {name: module for name, module in model.named_modules() if isinstance(module, peft_layer.ParamWrapper)}
    for name, parameter in adapter_parameters(model):
        if ".lora_B." in name:
            parameter.zero_()
        if ".lora_A." not in name:
            continue
        owner, _, rest = name.partition(".lora_A.")
        wrapper = wrappers.get(owner)
        stacked = 1
        if wrapper is not None:
            owner, stacked = f"{expert_lora.plain_name(owner)}.{wrapper.parameter_name}", wrapper.num_experts
        digest = hashlib.sha256(f"{seed} {owner}.lora_A.{rest}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows, in_features = parameter.shape
        start = torch.empty(rows, in_features, dtype=torch.float32)
        if section.init == "gaussian":
            start.normal_(0, stacked / rows, generator=generator)
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
    """Put the tensors of a PEFT folder, in either layout of experts, into the attached adapter.

    Raises:
        ModelError: the folder is no adapter, holds a pickle, or does not fit the attached adapter.
    """
    ours = model.peft_config[ADAPTER]
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}

    def fits(config: dict[str, Any], shapes: Shapes) -> None:
        refuse_others(folder, config, ours)
        if layout_of(shapes) == "stock":
            check_shapes(folder, config, shapes, wanted, ours, _ranks(model))

    files = read_as_stock(folder, family_of(model.config), fits)
    found = {name: tuple(tensor.shape) for name, tensor in files.tensors.items()}
    check_shapes(folder, files.config, found, wanted, ours, _ranks(model))
    set_peft_model_state_dict(model, files.tensors, adapter_name=ADAPTER)


def _ranks(model: nn.Module) -> dict[str, int]:
    """The rank that every adapted layer has in `model`, by its full name; of a bare parameter, by the parameter's."""
    ranks = {
        (f"{name}.{module.parameter_name}" if isinstance(module, peft_layer.ParamWrapper) else name): module.r[ADAPTER]
        for name, module in model.named_modules()
        if isinstance(module, peft_layer.LoraLayer) and ADAPTER in module.r
    }
    return {expert_lora.plain_name(name).removeprefix("base_model.model."): rank for name, rank in ranks.items()}
