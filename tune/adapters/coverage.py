"""What is quantised and what is adapted, counted in the model as it stands, and the gate before the first step.

A library that is asked for 4-bit quantises the layers it knows and says nothing of the rest; one that is asked for
LoRA on a name adapts what matches and says nothing of what does not. Here the loaded model is counted against the
recipe's claim, and training does not start when they differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from tune.adapters.expert_lora import plain_name
from tune.adapters.lora import IN_FULL, linears
from tune.adapters.router import routers
from tune.adapters.token_rows import trained_wrappers, unwrapped
from tune.errors import ModelError
from tune.models.experts import STACKS, NF4Experts, expert_modules
from tune.models.sharding import quant_state_of, state_tensors

Part = Literal["linear", "experts", "router"]


@dataclass(frozen=True, slots=True)
class Kind:
    """All layers of one name, such as `q_proj`; all experts of all layers; or all routers, which stay in 16 bit."""

    name: str
    part: Part
    layers: int
    """How many: of experts, each one of each layer counts."""
    quantized: int
    adapted: int
    bytes: int
    """Of the frozen weights, as stored, quantisation constants included."""
    adapter_parameters: int


@dataclass(frozen=True, slots=True)
class TrainedRows:
    """Rows of the embedding and the output head that train whole."""

    tokens: tuple[int, ...]
    modules: tuple[str, ...]
    """Whose rows: of both, or of the embedding where the head is tied to it."""
    tied: tuple[str, ...]
    """What uses the same rows."""
    parameters: int

    @property
    def line(self) -> str:
        """The literal line of the table."""
        tied = f", tied to {' and '.join(self.tied)}" if self.tied else ""
        return f"trained rows {len(self.tokens)} of {' and '.join(self.modules)}{tied}"


@dataclass(frozen=True, slots=True)
class Coverage:
    """The start-up table."""

    kinds: tuple[Kind, ...]
    storage: str
    """`nf4`, or the dtype of the weights."""
    claimed: int
    """What the recipe says is adapted: linear layers, single experts and routers."""
    frozen_bytes: int
    """Everything frozen: the layers above, embeddings, norms and the output head."""
    adapter_parameters: int
    trained_rows: TrainedRows | None = None
    """Of tokens that were added."""

    @property
    def lines(self) -> tuple[str, ...]:
        """The literal lines that end the table."""
        counted: list[str] = []
        for part, words in (("linear", "linears"), ("experts", "experts")):
            kinds = [kind for kind in self.kinds if kind.part == part]
            total = sum(kind.layers for kind in kinds)
            stored = sum(kind.quantized for kind in kinds) if self.storage == "nf4" else total
            if kinds:
                counted.append(f"{words} {stored}/{total} {self.storage}")
        counted.append(f"adapted {sum(kind.adapted for kind in self.kinds)}/{self.claimed}")
        return (*counted, self.trained_rows.line) if self.trained_rows is not None else tuple(counted)

    def to_json(self) -> dict[str, Any]:
        """The content of coverage.json."""
        return {**asdict(self), "lines": list(self.lines)}


def _stored_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' own frozen weights and quantisation constants, over all devices that they are split over.

    A tied weight counts once.
    """
    seen: set[int] = set()
    total = 0
    for module in modules:
        for key, parameter in module.named_parameters(recurse=False):
            state = quant_state_of(module, key)
            held: list[Tensor] = [] if parameter.requires_grad else [parameter]
            held += state_tensors(state) if state is not None else []
            for tensor in held:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    total += tensor.numel() * tensor.element_size()
    return total


@dataclass(frozen=True, slots=True)
class _Inventory:
    """What a model with adapters is made of, by the names that its modules had before."""

    layers: dict[str, nn.Module]
    """Linear layers."""
    experts: dict[str, nn.Module]
    """One module for all experts of a layer."""
    routers: dict[str, nn.Module]
    adapters: dict[str, Any]
    """PEFT's layers, by the module or the parameter that each adapts."""

    @staticmethod
    def of(model: nn.Module) -> _Inventory:
        from peft.tuners.lora import LoraLayer

        layers = {plain_name(name): module for name, module in linears(model).items() if not _inside_adapter(name)}
        experts = {plain_name(name): module for name, module in expert_modules(model).items()}
        adapters = {}
        for name, module in model.named_modules():
            if isinstance(module, LoraLayer):
                parameter = getattr(module, "parameter_name", None)
                adapters[plain_name(name) + (f".{parameter}" if parameter else "")] = module
        return _Inventory(layers, experts, routers(model), adapters)

    def unquantized(self) -> list[str]:
        """The linear layers and the layers' experts that are not in 4 bit."""
        import bitsandbytes as bnb

        return [
            name
            for name, module in self.layers.items()
            if not (isinstance(module, bnb.nn.Linear4bit) and quant_state_of(module) is not None)
        ] + [name for name, module in self.experts.items() if None in _states(module)]

    def trains(self, name: str, rank: int) -> bool:
        """Whether the module or parameter of this name trains as it should."""
        if rank == IN_FULL:
            gate = self.routers.get(name.removesuffix(".weight"))
            return gate is not None and bool(gate.weight.requires_grad)
        layer = self.adapters.get(name)
        if layer is None or not layer.active_adapters:
            return False
        adapter = layer.active_adapters[0]
        if layer.r.get(adapter) != rank:
            return False
        return bool(layer.lora_A[adapter].weight.requires_grad and layer.lora_B[adapter].weight.requires_grad)


def check_coverage(
    model: nn.Module, claimed: Mapping[str, int], quantization: str, added: Sequence[int] = ()
) -> Coverage:
    """Count what `model` (after injection) quantises and adapts, and refuse what falls short of the recipe.

    Args:
        model: the base with the adapter injected in place.
        claimed: the rank of everything that the recipe adapts, by name, as `resolve_targets` returns it.
        quantization: the recipe's `model.quantization`.
        added: the tokens whose rows of embedding and head train.

    Raises:
        ModelError: a linear layer or a layer's experts are not 4-bit though the recipe says nf4, or something claimed
            carries no trainable adapter of its rank; the message names the modules.
    """
    inventory = _Inventory.of(model)
    unquantized = inventory.unquantized()
    if quantization == "nf4":
        for words, names in (
            ("linear layers stayed unquantised", [name for name in unquantized if name in inventory.layers]),
            ("layers' experts stayed unquantised", [name for name in unquantized if name in inventory.experts]),
            ("weights that are no linear layer (experts?) stayed unquantised", sorted(_left_whole(model, inventory))),
        ):
            if names:
                raise ModelError(_shortfall("model.quantization: nf4", words, names))
    idle = [name for name, rank in claimed.items() if not inventory.trains(name, rank)]
    frozen = [name for name in idle if claimed[name] == IN_FULL]
    if frozen:
        raise ModelError(_shortfall("router.train: full", "routers do not train", frozen))
    if idle:
        raise ModelError(_shortfall("adapter.targets", "layers carry no trainable adapter", idle))

    dtype = str(next(iter(inventory.layers.values())).weight.dtype).removeprefix("torch.")
    return Coverage(
        kinds=tuple(_kinds(inventory, claimed, set(unquantized))),
        storage="nf4" if quantization == "nf4" else dtype,
        claimed=sum(_count(inventory, name) for name in _units(claimed)),
        frozen_bytes=_stored_bytes(module for name, module in model.named_modules() if not _inside_adapter(name)),
        adapter_parameters=_trained(model),
        trained_rows=_trained_rows(model, added),
    )


def _trained_rows(model: Any, added: Sequence[int]) -> TrainedRows | None:
    """The rows that train, checked to be those of the added tokens in both embedding and output head."""
    layers = {name: wrapper.token_adapter for name, wrapper in trained_wrappers(model).items()}
    if not added and not layers:
        return None
    wanted = {id(unwrapped(model.get_input_embeddings())), id(unwrapped(model.get_output_embeddings()))}
    training = {
        id(layer.base_layer)
        for layer in layers.values()
        if sorted(layer.token_indices[layer.active_adapters[0]]) == sorted(added)
        and layer.trainable_tokens_delta[layer.active_adapters[0]].requires_grad
    }
    if training != wanted:
        names = [plain_name(name) for name, module in model.named_modules() if id(module) in wanted - training]
        raise ModelError(_shortfall("data.add_tokens", "matrices do not train the rows of added tokens", names))
    own = [name.rpartition(".")[2] for name, layer in layers.items() if layer.tied_adapter is None]
    tied = [name.rpartition(".")[2] for name, layer in layers.items() if layer.tied_adapter is not None]
    parameters = sum(_trained(layer) for layer in layers.values() if layer.tied_adapter is None)
    return TrainedRows(tuple(sorted(added)), tuple(own), tuple(tied), parameters)


def _kinds(inventory: _Inventory, claimed: Mapping[str, int], unquantized: set[str]) -> Iterator[Kind]:
    adapters = inventory.adapters
    for last in dict.fromkeys(name.rsplit(".", 1)[-1] for name in inventory.layers):
        names = [name for name in inventory.layers if name.rsplit(".", 1)[-1] == last]
        yield Kind(
            name=last,
            part="linear",
            layers=len(names),
            quantized=len(set(names) - unquantized),
            adapted=len(set(names) & adapters.keys()),
            bytes=_stored_bytes(inventory.layers[name] for name in names),
            adapter_parameters=sum(_own(adapters[name]) for name in names if name in adapters),
        )
    if inventory.experts:
        stacks = [f"{name}.{stack}" for name in inventory.experts for stack in STACKS]
        adapted = _units(stack for stack in stacks if stack in adapters)
        yield Kind(
            name="experts",
            part="experts",
            layers=sum(_count(inventory, name) for name in inventory.experts),
            quantized=sum(_count(inventory, name) for name in inventory.experts if name not in unquantized),
            adapted=sum(_count(inventory, name) for name in adapted),
            bytes=_stored_bytes(inventory.experts.values()),
            adapter_parameters=sum(_own(adapters[stack]) for stack in stacks if stack in adapters),
        )
    if inventory.routers:
        trained = [name for name in inventory.routers if f"{name}.weight" in {*adapters, *claimed}]
        yield Kind(
            name="router",
            part="router",
            layers=len(inventory.routers),
            quantized=0,
            adapted=len(trained),
            bytes=_stored_bytes(m for module in inventory.routers.values() for m in module.modules()),
            adapter_parameters=sum(_trained(inventory.routers[name]) for name in trained),
        )


def _units(names: Iterable[str]) -> dict[str, None]:
    """Names with the two stacks of a layer's experts as one, by the module that holds them."""
    return dict.fromkeys(name.removesuffix(f".{STACKS[0]}").removesuffix(f".{STACKS[1]}") for name in names)


def _count(inventory: _Inventory, name: str) -> int:
    """How many a name counts for: all experts of a layer, or one."""
    module = inventory.experts.get(name)
    return 1 if module is None else int(module.num_experts)  # type: ignore[arg-type]


def _states(module: nn.Module) -> tuple[Any, Any]:
    """What unpacks the two stacks of a layer's experts; None where one is dense."""
    gate_up, down = (module.state_of(stack) if isinstance(module, NF4Experts) else None for stack in STACKS)
    return gate_up, down


def _left_whole(model: nn.Module, inventory: _Inventory) -> Iterator[str]:
    """Yield the frozen matrices that nothing in 4 bit holds.

    Embeddings, the output head and routers stay in 16 bit by design.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = unwrapped(get_head()) if get_head is not None else None
    routers = {id(module) for router in inventory.routers.values() for module in router.modules()}
    for name, module in model.named_modules():
        packed = plain_name(name) in inventory.layers or plain_name(name) in inventory.experts
        known = packed or isinstance(module, nn.Embedding) or module is head or id(module) in routers
        if not known and not _inside_adapter(name):
            yield from (f"{name}.{key}" for key, weight in module.named_parameters(recurse=False) if weight.dim() >= 2)


def _inside_adapter(name: str) -> bool:
    return ".lora_" in name or ".trainable_tokens_" in name


def _trained(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _own(layer: Any) -> int:
    """Trained parameters of a PEFT layer, without those of another that it is wrapped around."""
    return sum(_trained(half) for half in (layer.lora_A, layer.lora_B))


def _shortfall(key: str, words: str, names: list[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"{key}: {len(names)} {words}: {shown}. Nothing was trained."
