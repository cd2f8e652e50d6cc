"""NF4 in transformers' own loader, for every linear layer of a base.

transformers' 4-bit quantizer replaces layers whose class is exactly `nn.Linear` and says nothing of the rest. A
family with a linear class of its own (Falcon) would load in 16 bit under a model that calls itself 4-bit. This
quantizer makes those layers plain ones, while they are still empty, and leaves the packing to bitsandbytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

METHOD = "tune_nf4"

PLAIN_LINEARS = {"FalconLinear"}
"""Subclasses of nn.Linear, by class name, whose forward is x Wᵀ + b and nothing else."""


@register_quantization_config(METHOD)
class NF4Config(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' NF4 with double quantisation, under a name of its own."""

    def __init__(self, compute_dtype: torch.dtype = torch.bfloat16, **settings: Any) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype,
            **settings,
        )
        self.quant_method = METHOD


@register_quantizer(METHOD)
class NF4Quantizer(Bnb4BitHfQuantizer):  # type: ignore[misc]
    """bitsandbytes' quantizer, after every equivalent of `nn.Linear` was made one."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any, **kwargs: Any) -> None:
        for name, module in list(model.named_modules()):
            if type(module).__name__ in PLAIN_LINEARS and isinstance(module, nn.Linear):
                plain = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
                model.set_submodule(name, plain)
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
