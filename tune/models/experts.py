"""The experts of a mixture of experts, packed in NF4, and what there is to know about dense ones.

transformers keeps all experts of a layer in two parameters, gate_up_proj [E, 2I, H] and down_proj [E, H, I], in every
family with that layout (Mixtral, OLMoE, Qwen-MoE). No 4-bit library packs them: they are no linear layers. Here each
stack is packed as a whole, bit for bit as bitsandbytes' `quantize_4bit` packs a [E, 2I, H] tensor, but from its
experts one after the other and some millions of elements at a time, so that packing needs little memory: blocks of
64 elements are independent of each other, and only their scales are quantised together, at the end.

Dense and packed experts are computed by the same op (`tune.kernels.nf4_experts`). It is registered with transformers
as an experts implementation, since none of transformers' own works at every size on every device.

Shapes: E experts, I intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, quantize_4bit, quantize_blockwise
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tune.kernels.nf4_experts import ExpertWeights, experts

IMPLEMENTATION = "tune"
"""The name that transformers knows the op by: `experts_implementation`."""

STACKS = ("gate_up_proj", "down_proj")

_BLOCK = 64
_ELEMENTS = 2**22
"""Elements quantised at once: bitsandbytes needs some 20 bytes for each of them on a CPU. A multiple of the block."""


def pack(parts: Sequence[Tensor], shape: Sequence[int], storage: torch.dtype = torch.uint8) -> Params4bit:
    """Pack tensors, taken one after the other as the elements of one of `shape`, in NF4 with double quantisation.

    Args:
        parts: of one floating-point dtype, on one device, in the order of the result's elements.
        shape: of the whole.
        storage: the dtype that the packed bytes are kept in.

    Returns:
        A frozen parameter with its `quant_state`; all of it equals bitsandbytes' `quantize_4bit` of the whole.
    """
    if any(part.numel() % _BLOCK for part in parts[:-1]):
        parts = [torch.cat([part.reshape(-1) for part in parts])]
    count, device = sum(part.numel() for part in parts), parts[0].device
    packed = torch.empty(-(-count // 2), dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-count // _BLOCK), dtype=torch.float32, device=device)
    at, code = 0, None
    for part in parts:
        for chunk in torch.split(part.detach().reshape(-1), _ELEMENTS):
            quantized, state = quantize_4bit(chunk, blocksize=_BLOCK, compress_statistics=False, quant_type="nf4")
            packed[at // 2 : at // 2 + len(quantized)] = quantized.view(-1)
            absmax[at // _BLOCK : at // _BLOCK + len(state.absmax)] = state.absmax
            at, code = at + len(chunk), state.code
    offset = absmax.mean()
    scales, inner = quantize_blockwise(absmax - offset, blocksize=256)
    state = QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        code=code,
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=parts[0].dtype,
        offset=offset,
        state2=inner,
    )
    return packed_parameter(packed.view(storage).unsqueeze(1), state)


def packed_parameter(packed: Tensor, state: QuantState) -> Params4bit:
    """Return packed bytes and what unpacks them as one frozen parameter."""
    return Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        bnb_quantized=True,
    )


class NF4Experts(nn.Module):
    """All experts of one layer in NF4, in the place of a transformers experts class with SwiGLU.

    Until a checkpoint is loaded its parameters lie on the meta device, in the shapes of the dense ones.
    """

    def __init__(self, experts_module: nn.Module, storage: torch.dtype = torch.uint8, packed: bool = False) -> None:
        """Take over the sizes of a dense experts module.

        Args:
            experts_module: one that `holds` accepts.
            storage: the dtype that packed bytes are kept in; bfloat16 where FSDP shards them.
            packed: whether the checkpoint to be loaded is packed already.
        """
        super().__init__()
        assert holds(experts_module), type(experts_module)
        self.num_experts, self.hidden_dim, self.intermediate_dim = _sizes(experts_module)
        self.storage = storage
        self.gate_up_state: QuantState | None = None
        self.down_state: QuantState | None = None
        for name in STACKS:
            dense = getattr(experts_module, name)
            # A loader casts what it reads to the dtype that it finds here.
            empty = torch.empty(dense.shape, dtype=storage if packed else dense.dtype, device="meta")
            parameter = Params4bit(empty, requires_grad=False, quant_type="nf4", quant_storage=storage)
            self.register_parameter(name, parameter)

    def shape_of(self, name: str) -> tuple[int, int, int]:
        """Return the dense shape of `gate_up_proj` or `down_proj`."""
        if name == "gate_up_proj":
            return self.num_experts, 2 * self.intermediate_dim, self.hidden_dim
        return self.num_experts, self.hidden_dim, self.intermediate_dim

    def state_of(self, name: str) -> QuantState | None:
        """Return what unpacks one of the stacks, or None before it is packed.

        The parameter carries it too, but a library that wraps parameters (FSDP) loses it there.
        """
        state: QuantState | None = self.gate_up_state if name == "gate_up_proj" else self.down_state
        return state

    def remember(self, name: str, state: QuantState | None) -> None:
        """Keep what unpacks one of the stacks."""
        if name == "gate_up_proj":
            self.gate_up_state = state
        else:
            self.down_state = state

    def weights(self) -> ExpertWeights:
        """Return the packed stacks as the op takes them; they are views, not copies."""
        assert self.gate_up_state is not None, "gate_up_proj is not packed"
        assert self.down_state is not None, "down_proj is not packed"
        return ExpertWeights(
            _plain(self.get_parameter("gate_up_proj")),
            _plain(self.get_parameter("down_proj")),
            self.gate_up_state,
            self.down_state,
            self.num_experts,
            self.intermediate_dim,
            self.hidden_dim,
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of every token's chosen experts, [T, H].

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K], each token's experts.
            top_k_weights: [T, K], the router's weights for them.
        """
        return experts(hidden_states, top_k_index, top_k_weights, self.weights())

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}, nf4"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in STACKS:
            state = self.state_of(name)
            if state is not None:
                for key, value in state.as_dict(packed=True).items():
                    destination[f"{prefix}{name}.{key}"] = value if keep_vars else value.detach()


def _plain(parameter: Tensor) -> Tensor:
    """Without bitsandbytes' subclass, whose every slice would go through Python."""
    return parameter.as_subclass(Tensor) if isinstance(parameter, Params4bit) else parameter


def _sizes(module: nn.Module) -> tuple[int, int, int]:
    """Return E, H and I of dense experts."""
    gate_up = module.gate_up_proj
    assert isinstance(gate_up, Tensor)
    return gate_up.shape[0], gate_up.shape[2], gate_up.shape[1] // 2


def holds(module: nn.Module) -> bool:
    """Whether the op computes what a transformers experts module computes.

    That is: down(silu(gate) · up) without biases, with gate and up concatenated in gate_up_proj [E, 2I, H], and
    down_proj [E, H, I]. A class that transformers dispatches by name declares its layout.
    """
    parameters = dict(module.named_parameters(recurse=False))
    if set(parameters) != set(STACKS) or any(parameter.dim() != 3 for parameter in parameters.values()):
        return False
    experts_e, wide, hidden = parameters["gate_up_proj"].shape
    declared = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        tuple(parameters["down_proj"].shape) == (experts_e, hidden, wide // 2)
        and all(getattr(module, key, None) is value for key, value in declared.items())
        and not getattr(module, "has_post_expert_norm", False)
        # A family with another gate (clamped, scaled) overrides transformers' own.
        and getattr(gate, "__module__", None) == "transformers.integrations.moe"
        and isinstance(getattr(module, "act_fn", None), (nn.SiLU, SiLUActivation))
    )


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules, by name, that hold a layer's experts in a layout that the op computes, packed or dense."""
    return {name: module for name, module in model.named_modules() if isinstance(module, NF4Experts) or holds(module)}


def foreign_experts(model: nn.Module) -> list[str]:
    """Return the names of modules whose class is called experts and whose layout the op does not compute."""
    known = expert_modules(model)
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Experts") and name not in known
    ]


def weights_of(module: nn.Module) -> ExpertWeights:
    """Return the weights of one of the `expert_modules` as the op takes them."""
    if isinstance(module, NF4Experts):
        return module.weights()
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    experts_e, hidden, intermediate = _sizes(module)
    return ExpertWeights(gate_up, down, None, None, experts_e, intermediate, hidden)


def _dense_forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return experts(hidden_states, top_k_index, top_k_weights, weights_of(module))


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _dense_forward)
