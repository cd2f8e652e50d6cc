"""The adapter as stock PEFT has it: the truth that a merge is held against."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from tune.adapters.config_file import peft_config
from tune.adapters.files import read_config_of, read_tensors
from tune.adapters.token_rows import trained_tokens
from tune.errors import ModelError
from tune.export.subject import Subject
from tune.models.replaced_rows import RowValues
from tune.models.shards import Stack
from tune.models.streamed import StreamedModel

_WRITE_AGAIN = "Remove the run's finished.json; `tune train RUN/recipe.yaml --resume` writes the adapter again."


class StockModel(StreamedModel):
    """A base without weights, with PEFT's own LoRA layers and an adapter's weights in them."""

    rows: dict[str, RowValues]
    """The rows that PEFT puts into embedding and output head, by their stored name."""


def with_stock_adapter(subject: Subject, device: torch.device) -> StockModel:
    """Return the base without weights and PEFT's own LoRA layers around its linears, with the adapter's weights.

    Rows of added tokens are PEFT's too: it says whose they are and which. But its layer for them needs a matrix to put
    them into, and there is none here, so they are handed out for whoever brings the weights.

    Raises:
        ModelError: PEFT finds other layers to adapt than the adapter has tensors for.
    """
    from peft import PeftModel

    section = subject.recipe.model
    config = peft_config(subject.adapter, read_config_of(subject.adapter))
    base = copy.deepcopy(subject.config)
    base.vocab_size = max([base.vocab_size, *(1 + token for token in trained_tokens(config.trainable_token_indices))])
    streamed = StockModel(base, section.base, section.trust_remote_code)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel(streamed.model, config, low_cpu_mem_usage=True)
    model.eval()
    tensors = read_tensors(subject.adapter)
    streamed.rows = _take_rows(model, streamed, subject, tensors)
    _fill(model, subject.adapter, tensors, device)
    return streamed


def _take_rows(model: Any, streamed: StockModel, subject: Subject, tensors: dict[str, Tensor]) -> dict[str, RowValues]:
    """Take PEFT's wrappers off embedding and output head, and their tensors out of `tensors`."""
    names = {id(module): name for name, module in streamed.modules.items()}
    wrappers = [(name, module) for name, module in model.named_modules() if isinstance(module, TrainableTokensWrapper)]
    wrappers.sort(key=lambda item: item[1].token_adapter.tied_adapter is not None)
    values: dict[int, Tensor] = {}
    rows: dict[str, RowValues] = {}
    for name, wrapper in wrappers:
        layer = wrapper.token_adapter
        if layer.tied_adapter is None:
            expected = list(layer.trainable_tokens_delta["default"].shape)
            tensor = tensors.pop(f"{name}.token_adapter.trainable_tokens_delta", None)
            if tensor is None or list(tensor.shape) != expected:
                raise ModelError(f"{subject.adapter}: stock PEFT expects rows of {name} {expected}. {_WRITE_AGAIN}")
            values[id(layer)] = tensor.float()
        owner = layer.tied_adapter or layer
        stored = streamed.stored(subject.checkpoint, names[id(wrapper.original_module)])
        assert isinstance(stored, str)
        rows[stored] = RowValues(tuple(owner.token_indices["default"]), values[id(owner)])
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, wrapper.original_module)
    return rows


def _fill(model: Any, adapter: Path, tensors: dict[str, Tensor], device: torch.device) -> None:
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last == "default" and isinstance(module, nn.Linear):
            tensor = tensors.pop(f"{parent}.weight", None)
            if tensor is None or tensor.shape != module.weight.shape:
                raise ModelError(
                    f"{adapter}: stock PEFT expects {parent}.weight of "
                    f"{list(module.weight.shape)} there. {_WRITE_AGAIN}"
                )
            module.weight = nn.Parameter(tensor.to(device, torch.float32), requires_grad=False)
        elif isinstance(module, ModulesToSaveWrapper):
            saved = tensors.pop(f"{name}.weight", None)
            if saved is None:
                raise ModelError(f"{adapter}: stock PEFT expects {name}.weight there. {_WRITE_AGAIN}")
            module.modules_to_save["default"].weight = nn.Parameter(saved.to(device).float(), requires_grad=False)
    if tensors:
        raise ModelError(f"{adapter}: stock PEFT has no place for {min(tensors)}. {_WRITE_AGAIN}")


class StockChange:
    """What stock PEFT adds to one matrix: a linear layer, a router, or some rows of one expert.

    Args:
        layer: PEFT's LoRA layer.
        newest: holds ΔW of all experts of the layer that was asked for last; shared by the changes of one model.
        expert: which of the layer's experts; None where the layer has one matrix.
        start, stop: the matrix's rows among the expert's.
    """

    def __init__(
        self, layer: Any, newest: dict[str, Any], expert: int | None = None, start: int = 0, stop: int | None = None
    ) -> None:
        self.layer, self.newest, self.expert, self.rows = layer, newest, expert, slice(start, stop)

    def exact(self, weight: Tensor) -> Tensor:
        """Return W + ΔW [out, in] in float32 on the CPU, or what takes the place of W."""
        if self.replaces:
            value: Tensor = self.layer.modules_to_save["default"].weight
            return value.float().cpu()
        return weight + self.delta()

    @property
    def replaces(self) -> bool:
        """Whether the matrix trained in full."""
        return hasattr(self.layer, "modules_to_save")

    def delta(self) -> Tensor:
        """Return ΔW [out, in] in float32 on the CPU."""
        if self.expert is None:
            return _delta_of(self.layer)
        # PEFT computes all experts of a layer at once, and its experts are asked for one after the other.
        if self.newest.get("layer") is not self.layer:
            self.newest.clear()
            self.newest.update(layer=self.layer, delta=_delta_of(self.layer))
        return cast(Tensor, self.newest["delta"][self.expert, self.rows])

    def sizes(self) -> tuple[Tensor, Tensor]:
        """Return s·‖bᵢ‖ [out] and ‖aⱼ‖ [in] on the CPU.

        Their product bounds the numbers that are summed to each element of ΔW (Cauchy-Schwarz): what float32 loses
        in a sum grows with those, and not with the sum.
        """
        if self.replaces:
            weight = self.layer.modules_to_save["default"].weight
            return torch.zeros(weight.shape[0]), torch.zeros(weight.shape[1])
        a_RI, b_OR = self.layer.lora_A["default"].weight, self.layer.lora_B["default"].weight
        if self.expert is not None:
            a_RI = a_RI.unflatten(0, (self.layer.num_experts, -1))[self.expert]
            b_OR = b_OR.unflatten(1, (-1, self.layer.num_experts))[self.rows, :, self.expert]
        return (abs(self.layer.scaling["default"]) * b_OR.norm(dim=1)).cpu(), a_RI.norm(dim=0).cpu()


def _delta_of(layer: Any) -> Tensor:
    name = getattr(layer, "parameter_name", None)
    base = layer.get_base_layer()
    empty = None if name is None else base._parameters[name]
    if name is not None:  # PEFT puts the result where the parameter is, which is nowhere as yet
        base._parameters[name] = nn.Parameter(torch.empty(0), requires_grad=False)
    try:
        delta: Tensor = layer.get_delta_weight("default")
    finally:
        if name is not None:
            base._parameters[name] = empty
    return delta.float().cpu()


def stock_changes(subject: Subject, stock: StockModel) -> dict[str, list[StockChange]]:
    """Return what PEFT adds to each stored tensor, by its name: one change, or one for each expert in it."""
    from peft.tuners.lora import LoraLayer

    names = {id(module): name for name, module in stock.modules.items()}
    found: dict[str, list[StockChange]] = {}
    newest: dict[str, Any] = {}
    for layer in (module for module in stock.model.modules() if isinstance(module, ModulesToSaveWrapper)):
        whole = stock.stored(subject.checkpoint, names[id(layer.original_module)])
        assert isinstance(whole, str)
        found[whole] = [StockChange(layer, newest)]
    for layer in (module for module in stock.model.modules() if isinstance(module, LoraLayer)):
        parameter = getattr(layer, "parameter_name", None) or "weight"
        stored = stock.stored(subject.checkpoint, names[id(layer.get_base_layer())], parameter)
        if isinstance(stored, Stack):
            for expert, matrices in enumerate(stored.experts):
                start = 0
                for name in matrices:
                    stop = start + subject.checkpoint.places[name].shape[0]
                    found[name] = [StockChange(layer, newest, expert, start, stop)]
                    start = stop
        elif len(subject.checkpoint.places[stored].shape) == 3:
            found[stored] = [StockChange(layer, newest, expert) for expert in range(layer.num_experts)]
        else:
            found[stored] = [StockChange(layer, newest)]
    return found
