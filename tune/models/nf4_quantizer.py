"""NF4 in transformers' own loader, for every linear layer of a base and for the experts of a mixture of them.

transformers' 4-bit quantizer replaces layers whose class is exactly `nn.Linear` and says nothing of the rest. A
family with a linear class of its own (Falcon) would load in 16 bit under a model that calls itself 4-bit, and so
would the experts of Mixtral, which are 45 of its 47 billion parameters. This quantizer makes those linear layers
plain ones and those experts `NF4Experts`, while they are still empty, and leaves the rest to bitsandbytes.

Experts come as one stack from some checkpoints and as a tensor for each expert and matrix (w1, w2, w3) from others.
transformers would stack and concatenate the latter, which takes two layers' stacks of memory on the device; here
they are handed on as they are read, and packed one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import Concatenate, ConversionOps, MergeModulelist, WeightConverter
from transformers.integrations.bitsandbytes import Bnb4bitQuantize
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from tune.models.experts import STACKS, NF4Experts, holds, pack, packed_parameter
from tune.models.mapped import MappedFiles

METHOD = "tune_nf4"

PLAIN_LINEARS = {"FalconLinear"}
"""Subclasses of nn.Linear, by class name, whose forward is x Wᵀ + b and nothing else."""

_SAVED = ("nested_absmax", "nested_quant_map", "quant_map", "absmax", "quant_state.bitsandbytes__nf4")
"""What bitsandbytes saves beside packed bytes, as suffixes of the parameter's name."""


@register_quantization_config(METHOD)
class NF4Config(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' NF4 with double quantisation, under a name of its own."""

    def __init__(
        self,
        compute_dtype: torch.dtype | str = torch.bfloat16,
        storage: torch.dtype | str = torch.uint8,
        **settings: Any,
    ) -> None:
        """Set what of bitsandbytes' NF4 may differ.

        Args:
            compute_dtype: what products are computed in.
            storage: the dtype that packed bytes are kept in; bfloat16 where FSDP shards them.
            settings: further ones of `BitsAndBytesConfig`.
        """
        settings.pop("quant_method", None)
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=storage,
            **settings,
        )
        self.quant_method = METHOD

    def to_dict(self) -> dict[str, Any]:
        """Return what is saved in a config.json. With `load_in_4bit` there, transformers would take it for its own."""
        return {
            "quant_method": METHOD,
            "compute_dtype": str(self.bnb_4bit_compute_dtype).removeprefix("torch."),
            "storage": str(self.bnb_4bit_quant_storage).removeprefix("torch."),
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the same: every entry is needed to read the model again."""
        return self.to_dict()


@dataclass(frozen=True, slots=True)
class _Unstacked:
    """Tensors of a stack that were stored expert by expert: a list for each matrix that makes up an expert's rows."""

    matrices: tuple[list[Tensor], ...]

    def parts(self) -> tuple[list[Tensor], tuple[int, ...]] | None:
        """Return all tensors in the order of the stack's elements, and its shape; None when they make up no stack."""
        counts = {len(tensors) for tensors in self.matrices}
        shapes = [{tensor.shape for tensor in tensors} for tensors in self.matrices]
        if len(counts) != 1 or any(len(found) != 1 for found in shapes):
            return None
        whole = [next(iter(found)) for found in shapes]
        if any(len(shape) != 2 for shape in whole) or len({shape[1] for shape in whole}) != 1:
            return None
        shape = (counts.pop(), sum(shape[0] for shape in whole), whole[0][1])
        return [tensor for expert in zip(*self.matrices, strict=True) for tensor in expert], shape


class _Collect(ConversionOps):  # type: ignore[misc]
    """In the place of stacking and concatenating, for experts that are to be packed: hand the tensors on."""

    def __init__(self, operations: list[Any]) -> None:
        self.operations = operations

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **more: Any,
    ) -> dict[str, Any]:
        if isinstance(model.get_submodule(full_layer_name.rpartition(".")[0]), NF4Experts):
            matrices = tuple(input_dict[pattern] for pattern in source_patterns if pattern in input_dict)
            return {target_patterns[0]: _Unstacked(matrices)}
        more.update(full_layer_name=full_layer_name, model=model)
        for operation in self.operations:
            input_dict = operation.convert(
                input_dict, source_patterns=source_patterns, target_patterns=target_patterns, **more
            )
        return input_dict


class _Pack(Bnb4bitQuantize):  # type: ignore[misc]
    """Pack one parameter, and give back the memory that reading it took."""

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, model: Any = None, **more: Any
    ) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for key, value in input_dict.items():
            owner, _, name = key.rpartition(".")
            module: Any = model.get_submodule(owner)
            if not isinstance(module, NF4Experts):
                result.update(super().convert({key: value}, full_layer_name=full_layer_name, model=model, **more))
                continue
            if isinstance(value, list):
                (value,) = value
            found = value.parts() if isinstance(value, _Unstacked) else ([value], tuple(value.shape))
            if found:
                parameter = pack(found[0], found[1], module.storage)
            else:  # without a state it is found misshapen, and refused by name, when all is loaded
                parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            module.remember(name, getattr(parameter, "quant_state", None))
            vars(module)["_is_hf_initialized"] = True
            result[key] = parameter
        if self.hf_quantizer.mapped is not None:
            self.hf_quantizer.mapped.release()
        return result


class _Unsave(ConversionOps):  # type: ignore[misc]
    """Put together what `NF4Experts` saved of one stack."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer  # tells transformers to leave the dtypes alone

    def convert(
        self, input_dict: dict[str, Any], full_layer_name: str = "", model: Any = None, **more: Any
    ) -> dict[str, Tensor]:
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        owner, _, name = full_layer_name.rpartition(".")
        target = f"experts.{name}"
        packed = tensors.pop(target)
        state = QuantState.from_dict(tensors, device=packed.device)
        module = model.get_submodule(owner)
        module.remember(name, state)
        module._is_hf_initialized = True
        return {target: packed_parameter(packed, state)}


@register_quantizer(METHOD)
class NF4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' quantizer, after every equivalent of `nn.Linear` was made one and experts were made ours."""

    mapped: MappedFiles | None = None

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        self.mapped = MappedFiles(kwargs.get("checkpoint_files") or ())
        storage = self.quantization_config.bnb_4bit_quant_storage
        for name, module in list(model.named_modules()):
            if type(module).__name__ in PLAIN_LINEARS and isinstance(module, nn.Linear):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                model.set_submodule(name, plain)
            elif holds(module):
                model.set_submodule(name, NF4Experts(module, storage, self.pre_quantized))
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # Saving undoes the conversions of loading. What was packed stays so, and only names go back.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [made for made in conversions if not isinstance(made, WeightConverter)]
        return super()._process_model_after_weight_loading(model, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, name = param_name.rpartition(".")
        if isinstance(model.get_submodule(owner), NF4Experts):
            return name in STACKS
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> _Pack:
        return _Pack(self)

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        if not self.pre_quantized:
            for conversion in weight_conversions:
                if isinstance(conversion, WeightConverter) and _stacks_experts(conversion):
                    conversion.operations = [_Collect(conversion.operations)]
        return list(super().update_weight_conversions(weight_conversions, *model))

    def get_weight_conversions(self) -> list[Any]:
        mine = []
        if self.pre_quantized:
            for name in STACKS:
                # The packed bytes come last: in transformers before 5.23 the first pattern that matches wins.
                sources = [f"experts.{name}.{suffix}" for suffix in _SAVED] + [f"experts.{name}"]
                mine.append(WeightConverter(sources, f"experts.{name}", [_Unsave(self)]))
        return mine + list(super().get_weight_conversions())


def _stacks_experts(conversion: Any) -> bool:
    """Whether a conversion does nothing but stack experts, and concatenate their rows, into one of our stacks."""
    target = conversion.target_patterns[0]
    return (
        len(conversion.target_patterns) == 1
        and target.endswith(tuple(f"experts.{name}" for name in STACKS))
        and all(
            (type(op) is MergeModulelist and op.dim == 0) or (type(op) is Concatenate and op.dim == 1)
            for op in conversion.operations
        )
    )
