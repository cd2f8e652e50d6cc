"""All experts of one mixture-of-experts layer, dense or packed in NF4, with LoRA on either projection, as one op.

For every token and each of its K chosen experts e with router weight w:

    z = x W1ₑᵀ + s · drop(x) A1ₑᵀ B1ₑᵀ        h = silu(z[:I]) · z[I:]        o = h W2ₑᵀ + s · drop(h) A2ₑᵀ B2ₑᵀ
    y = Σ w · o

Forward: one stable sort puts the token slots in the order of experts, with one host sync for the counts. Expert by
expert, rows are gathered, the weight is dequantised, and the products write their part of the slots. A second gather
brings each token its K slots, weighted and added in float32: no atomics, so two runs agree bit for bit. Only one
expert's weights are ever dense at a time.

Backward: x, the router's choice and weights, A and B are all that is saved. Per expert z is computed again with the
dequantised W1 that dX needs as well. The gradient of h for an unweighted slot, g = dY W2 + s · (dY B2) A2, serves
twice: the router's gradient is ⟨g, h⟩ and that of h is w · g, so o is never recomputed. `keep="activations"` saves z
too and so spares the backward the product with W1; h is formed again from z, elementwise.

The forward is a registered operator, `EXPERTS_OP`, so that selective checkpointing can name it:
`create_selective_checkpoint_contexts([EXPERTS_OP])` as `context_fn` keeps y, and the recomputed forward of a layer
then skips its experts. A top-k must stay out of such a list: Mixtral's router divides its output in place.

Sorting tokens by expert instead of padding them is from MegaBlocks (Gale et al. 2022, arXiv:2211.15841).

Shapes: T tokens, K experts a token, S = T·K slots in the order of experts, N slots of one expert, E experts,
H hidden, I intermediate, Z = 2I, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor
from torch.nn.functional import embedding_bag, silu

from tune.kernels.expert_projection import Projection, dropout_mask, lora_a, lora_b
from tune.kernels.expert_slots import inverse, least, lengthened, pads, parts
from tune.kernels.nf4_stack import Stack


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The frozen weights of all experts of one layer; they never get a gradient.

    Dense, or packed as bitsandbytes packs the whole flattened stack (uint8, or the same bytes stored as bf16).
    """

    gate_up: Tensor
    """[E, 2I, H] when dense; the first I rows of an expert are the gate."""
    down: Tensor
    """[E, H, I] when dense."""
    gate_up_state: QuantState | None
    """None when dense."""
    down_state: QuantState | None
    num_experts: int
    intermediate: int
    hidden: int


@dataclass(frozen=True, slots=True)
class ExpertLora:
    """The LoRA of one of the two projections, in stock PEFT's layout for 3-D parameters."""

    a: Tensor
    """[E·R, in], rows expert-major."""
    b: Tensor
    """[out, R·E], columns rank-major with the expert fastest."""
    scaling: float
    dropout: float = 0.0
    """Probability in [0, 1) with which an element is dropped before A."""


def _draw_seed(gate_up: ExpertLora | None, down: ExpertLora | None) -> int:
    dropped = any(lora is not None and lora.dropout for lora in (gate_up, down))
    return int(torch.randint(2**62, ()).item()) if dropped else 0


def experts_reference(
    x_TH: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    weights: ExpertWeights,
    gate_up: ExpertLora | None = None,
    down: ExpertLora | None = None,
) -> Tensor:
    """The same function on whole dense stacks, differentiated by autograd: what `experts` must equal, with dropout."""
    count, dtype = weights.num_experts, x_TH.dtype
    sizes = (count, 2 * weights.intermediate, weights.hidden), (count, weights.hidden, weights.intermediate)
    stacks = Stack.of(weights.gate_up, weights.gate_up_state), Stack.of(weights.down, weights.down_state)
    seed = _draw_seed(gate_up, down)

    def project(x_NC: Tensor, number: int, lora: ExpertLora | None, expert: int) -> Tensor:
        y_NO = x_NC @ stacks[number].matrix(expert, *sizes[number][1:], dtype).T
        if lora is None:
            return y_NO
        if lora.dropout:
            x_NC = x_NC * dropout_mask(x_NC, lora.dropout, seed, number, expert)
        a_RC, b_OR = lora_a(lora.a, count)[expert].to(dtype), lora_b(lora.b, count)[expert].to(dtype)
        return y_NO + lora.scaling * (x_NC @ a_RC.T) @ b_OR.T

    y_TH = torch.zeros_like(x_TH)
    for expert in range(count):
        token_N, choice_N = torch.where(top_k_index_TK == expert)
        gate_NI, up_NI = project(x_TH[token_N], 0, gate_up, expert).chunk(2, dim=1)
        out_NH = project(silu(gate_NI) * up_NI, 1, down, expert)
        weighted_NH = out_NH * top_k_weights_TK[token_N, choice_N].unsqueeze(1)
        y_TH = y_TH.index_add(0, token_N, weighted_NH.to(dtype))
    return y_TH


@dataclass(frozen=True, slots=True)
class _Layer:
    """What both directions need beside activations and adapters."""

    stacks: tuple[Stack, Stack]
    num_experts: int
    intermediate: int
    counts: list[int]
    """Slots of each expert."""
    scaling: list[float]
    dropout: list[float]
    seed: int

    def projections(self, x_TH: Tensor, lora: Sequence[Tensor | None]) -> tuple[Projection, Projection]:
        hidden, inner = x_TH.shape[1], self.intermediate
        shapes = (self.num_experts, 2 * inner, hidden), (self.num_experts, hidden, inner)

        def projection(number: int) -> Projection:
            adapter = (lora[2 * number], lora[2 * number + 1], self.scaling[number], self.dropout[number])
            return Projection(number, shapes[number], self.counts, self.stacks[number], adapter, self.seed, x_TH.dtype)

        return projection(0), projection(1)


@torch.library.custom_op(
    "tune::experts",
    mutates_args=(),
    schema="(Tensor x, Tensor top_k_weights, Tensor order, Tensor?[] lora, Tensor[] gate_up, Tensor[] down, "
    "int[] gate_up_blocks, int[] down_blocks, ScalarType gate_up_dtype, ScalarType down_dtype, "
    "int[] sizes, int[] counts, float[] scaling, float[] dropout, bool keep) -> (Tensor, Tensor)",
)
def _experts_op(
    x_TH: Tensor,
    weights_TK: Tensor,
    order_S: Tensor,
    lora: list[Tensor | None],
    gate_up_tensors: list[Tensor],
    down_tensors: list[Tensor],
    gate_up_blocks: list[int],
    down_blocks: list[int],
    gate_up_dtype: torch.dtype,
    down_dtype: torch.dtype,
    sizes: list[int],
    counts: list[int],
    scaling: list[float],
    dropout: list[float],
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [T, H] and, when kept, z [S, 2I] in the order of experts (else an empty tensor)."""
    stacks = Stack(gate_up_tensors, gate_up_blocks, gate_up_dtype), Stack(down_tensors, down_blocks, down_dtype)
    layer = _Layer(stacks, sizes[0], sizes[1], counts, scaling, dropout, sizes[2])
    gate_up, down = layer.projections(x_TH, lora)
    (tokens, chosen), inner, filled = weights_TK.shape, layer.intermediate, parts(layer.counts, pads(x_TH), least(x_TH))
    token_S = lengthened(order_S // chosen, filled)
    z_SZ = x_TH.new_empty(
        len(token_S) if keep else max((part.stop - part.start for _, _, part in filled), default=0), 2 * inner
    )
    out_SH = x_TH.new_empty(len(token_S), x_TH.shape[1])
    for expert, _, part in filled:
        x_NH = x_TH.index_select(0, token_S[part])
        z_NZ = z_SZ[part] if keep else z_SZ[: len(x_NH)]
        gate_up.forward(x_NH, gate_up.weight(expert), gate_up.reduce(x_NH, expert), expert, z_NZ)
        h_NI = silu(z_NZ[:, :inner]).mul_(z_NZ[:, inner:])
        down.forward(h_NI, down.weight(expert), down.reduce(h_NI, expert), expert, out_SH[part])
    inverse_TK = inverse(order_S).view(tokens, chosen)
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
    for choice in range(chosen):
        y_TH.addcmul_(out_SH.index_select(0, inverse_TK[:, choice]).float(), weights_TK[:, choice : choice + 1].float())
    return y_TH.to(x_TH.dtype), z_SZ if keep else x_TH.new_empty(0)


EXPERTS_OP = torch.ops.tune.experts.default
"""The forward's name in a selective-checkpoint policy. Saving it keeps y, and z under `keep="activations"`."""


def _expert_backward(
    layer: _Layer,
    projections: tuple[Projection, Projection],
    expert: int,
    activations: tuple[Tensor, Tensor, Tensor | None],
    scale_N1: Tensor,
    dx_NH: Tensor | None,
    dweight_N: Tensor | None,
) -> None:
    """Write one expert's gradients of x and the router's weights where they are wanted, and keep those of its LoRA.

    `activations` are x [N, H], dY [N, H] and z [N, Z] or None.
    """
    (gate_up, down), (x_NH, dy_NH, z_NZ), inner = projections, activations, layer.intermediate
    w1_ZH = gate_up.weight(expert) if dx_NH is not None or z_NZ is None else None
    reduced_NR = gate_up.reduce(x_NH, expert)
    if z_NZ is None:
        assert w1_ZH is not None
        z_NZ = x_NH.new_empty(len(x_NH), 2 * inner)
        gate_up.forward(x_NH, w1_ZH, reduced_NR, expert, z_NZ)
    gate_NI, up_NI = z_NZ[:, :inner], z_NZ[:, inner:]
    active_NI = silu(gate_NI)
    h_NI = active_NI * up_NI
    d_reduced_NR = down.backward_lora(dy_NH, h_NI, down.reduce(h_NI, expert), expert, scale_N1)
    want_z = dx_NH is not None or gate_up.wants_gradients
    if dweight_N is None and not want_z:
        return
    g_NI = torch.empty_like(h_NI)
    down.backward_input(dy_NH, down.weight(expert), d_reduced_NR, expert, g_NI)
    if dweight_N is not None:
        dweight_N.copy_(h_NI.mul_(g_NI).sum(1, dtype=torch.float32))
    del h_NI
    if not want_z:
        return
    dh_NI = g_NI.mul_(scale_N1)
    dz_NZ = torch.empty_like(z_NZ)
    torch.mul(dh_NI, active_NI, out=dz_NZ[:, inner:])
    torch.ops.aten.silu_backward.grad_input(dh_NI.mul_(up_NI), gate_NI, grad_input=dz_NZ[:, :inner])
    d_reduced_NR = gate_up.backward_lora(dz_NZ, x_NH, reduced_NR, expert, None)
    if dx_NH is not None:
        assert w1_ZH is not None
        gate_up.backward_input(dz_NZ, w1_ZH, d_reduced_NR, expert, dx_NH)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        index_TK: Tensor,
        weights_TK: Tensor,
        layer: _Layer,
        keep: bool,
        *lora: Tensor | None,
    ) -> Tensor:
        first, second = layer.stacks
        sizes = [layer.num_experts, layer.intermediate, layer.seed]
        stacks = (first.tensors, second.tensors, first.blocks, second.blocks, first.dtype, second.dtype)
        order_S = index_TK.reshape(-1).argsort(stable=True)
        y_TH, z_SZ = EXPERTS_OP(
            x_TH, weights_TK, order_S, list(lora), *stacks, sizes, layer.counts, layer.scaling, layer.dropout, keep
        )
        ctx.save_for_backward(x_TH, index_TK, weights_TK, z_SZ if keep else None, *lora)
        ctx.layer = layer
        return y_TH  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, index_TK, weights_TK, z_SZ, *lora = ctx.saved_tensors
        layer: _Layer = ctx.layer
        want_x, _, want_weights, _, _, *want_lora = ctx.needs_input_grad
        gate_up, down = layer.projections(x_TH, lora)
        gate_up.want_gradients(*want_lora[:2])
        down.want_gradients(*want_lora[2:])
        order_S = index_TK.reshape(-1).argsort(stable=True)
        filled = parts(layer.counts, pads(x_TH), least(x_TH))
        token_S = lengthened(order_S // index_TK.shape[1], filled)
        weight_S1 = weights_TK.reshape(-1, 1)[order_S].float()
        dx_SH = x_TH.new_empty(len(token_S), x_TH.shape[1]) if want_x else None
        dweight_S = weight_S1.new_empty(len(token_S)) if want_weights else None
        for expert, count, part in filled:
            x_NH, dy_NH = (tensor.index_select(0, token_S[part]) for tensor in (x_TH, grads[0]))
            # Zero weights keep padding out of the gradients of A and B.
            scale_N1 = weight_S1.new_zeros(len(x_NH), 1)
            scale_N1[:count] = weight_S1[part.start : part.start + count]
            _expert_backward(
                layer,
                (gate_up, down),
                expert,
                (x_NH, dy_NH, None if z_SZ is None else z_SZ[part]),
                scale_N1,
                None if dx_SH is None else dx_SH[part],
                None if dweight_S is None else dweight_S[part],
            )
        inverse_S = inverse(order_S)
        dx_TH = None if dx_SH is None else embedding_bag(inverse_S.view(index_TK.shape), dx_SH, mode="sum")
        dweights_TK = None if dweight_S is None else dweight_S[inverse_S].view(index_TK.shape).to(weights_TK.dtype)
        return dx_TH, None, dweights_TK, None, None, *gate_up.gradients(), *down.gradients()


def experts(
    x_TH: Tensor,
    top_k_index_TK: Tensor,
    top_k_weights_TK: Tensor,
    weights: ExpertWeights,
    gate_up: ExpertLora | None = None,
    down: ExpertLora | None = None,
    *,
    keep: Literal["inputs", "activations"] = "inputs",
) -> Tensor:
    """Apply to every token its chosen experts, and add their outputs, weighted by the router.

    Args:
        x_TH: [T, H], float32 or bfloat16; all products are computed in its dtype. T may be 0.
        top_k_index_TK: [T, K] integers in [0, E), the experts of each token.
        top_k_weights_TK: [T, K], any float dtype.
        weights: the frozen stacks.
        gate_up, down: the LoRA of each projection, or None; any float dtype, their gradients come in that dtype.
        keep: what is saved for the backward. "inputs": x, indices, router weights, A and B. "activations": z as
            well, the gate and up values before the activation, 2I values a slot in x's dtype.

    Returns:
        [T, H] in x's dtype.
    """
    count, inner, hidden = weights.num_experts, weights.intermediate, weights.hidden
    assert x_TH.shape == (len(top_k_index_TK), hidden), (x_TH.shape, top_k_index_TK.shape, hidden)
    assert top_k_index_TK.shape == top_k_weights_TK.shape, (top_k_index_TK.shape, top_k_weights_TK.shape)
    stacks = Stack.of(weights.gate_up, weights.gate_up_state), Stack.of(weights.down, weights.down_state)
    assert stacks[0].holds(count * 2 * inner * hidden), (weights.gate_up.shape, count, inner, hidden)
    assert stacks[1].holds(count * inner * hidden), (weights.down.shape, count, inner, hidden)
    numbers_E = torch.arange(count, device=x_TH.device)
    counts: list[int] = (top_k_index_TK.reshape(-1, 1) == numbers_E).sum(0).tolist()
    assert sum(counts) == top_k_index_TK.numel(), f"an expert's index is outside [0, {count})"
    loras = gate_up, down
    scaling = [lora.scaling if lora else 1.0 for lora in loras]
    dropout = [lora.dropout if lora else 0.0 for lora in loras]
    layer = _Layer(stacks, count, inner, counts, scaling, dropout, _draw_seed(gate_up, down))
    adapters = [tensor for lora in loras for tensor in ((lora.a, lora.b) if lora else (None, None))]
    keep_z = keep == "activations" and torch.is_grad_enabled()
    return _Experts.apply(  # type: ignore[no-any-return,no-untyped-call]
        x_TH, top_k_index_TK, top_k_weights_TK, layer, keep_z, *adapters
    )
