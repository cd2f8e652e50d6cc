from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise, quantize_4bit
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock

from tune.kernels import nf4_experts
from tune.kernels.expert_slots import lengthened, parts, rounded
from tune.kernels.nf4_experts import EXPERTS_OP, ExpertLora, ExpertWeights, experts, experts_reference
from tune.kernels.nf4_stack import Stack

NAMES = ("x", "router weights", "gate_up A", "gate_up B", "down A", "down B")


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def pack(dense: torch.Tensor, nested: bool = True) -> tuple[torch.Tensor, QuantState]:
    return quantize_4bit(dense, blocksize=64, compress_statistics=nested, quant_type="nf4")


def unpacked_by_hand(packed: torch.Tensor, state: QuantState) -> torch.Tensor:
    """Every value looked up in the code and scaled, in plain PyTorch."""
    scales = state.absmax
    if state.nested:
        inner = state.state2
        index = torch.arange(scales.numel()) // inner.blocksize
        scales = inner.code[scales.long()] * inner.absmax[index] + state.offset
    bytes_ = packed.reshape(-1).view(torch.uint8).long()
    values = state.code[torch.stack([bytes_ >> 4, bytes_ & 15], dim=1).view(-1)][: state.shape.numel()]
    return (values * scales[torch.arange(len(values)) // state.blocksize]).view(state.shape).to(state.dtype)


@dataclasses.dataclass
class Case:
    """A layer and its inputs: `inputs` are x, router weights, and A and B of gate_up and down."""

    weights: ExpertWeights
    index: torch.Tensor
    inputs: list[torch.Tensor]
    targets: str = "both"
    dropout: float = 0.0

    def run(self, function: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
        gate_up = ExpertLora(inputs[2], inputs[3], 0.5, self.dropout) if self.targets in ("both", "gate_up") else None
        down = ExpertLora(inputs[4], inputs[5], 0.25, self.dropout) if self.targets in ("both", "down") else None
        y: torch.Tensor = function(inputs[0], self.index, inputs[1], self.weights, gate_up, down)
        return y

    def gradients(self, function: Any, seed: int = 1) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        inputs = [tensor.clone().requires_grad_() for tensor in self.inputs]
        torch.manual_seed(seed)
        y = self.run(function, inputs)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype))
        return y.detach(), [tensor.grad for tensor in inputs]


def make(
    tokens: int = 23,
    num_experts: int = 3,
    top_k: int = 2,
    hidden: int = 10,
    inner: int = 7,
    rank: int = 4,
    packed: bool = False,
    dtype: torch.dtype = torch.float32,
    unused: int | None = None,
    **rest: Any,
) -> Case:
    torch.manual_seed(0)
    gate_up = (torch.randn(num_experts, 2 * inner, hidden) / hidden**0.5).to(dtype)
    down = (torch.randn(num_experts, hidden, inner) / inner**0.5).to(dtype)
    scores = torch.randn(tokens, num_experts)
    if unused is not None:
        scores[:, unused] = -9
    chosen, index = scores.softmax(-1).topk(top_k)
    states = [None, None]
    if packed:
        (gate_up, states[0]), (down, states[1]) = pack(gate_up), pack(down)
    shapes = [(num_experts * rank, hidden), (2 * inner, rank * num_experts)]
    shapes += [(num_experts * rank, inner), (hidden, rank * num_experts)]
    adapters = [torch.randn(shape) / shape[1] ** 0.5 for shape in shapes]
    weights = ExpertWeights(gate_up, down, *states, num_experts, inner, hidden)
    return Case(weights, index, [torch.randn(tokens, hidden).to(dtype), chosen, *adapters], **rest)


def assert_equal_to_reference(case: Case, function: Any, bar: float = 1e-5) -> None:
    y, gradients = case.gradients(function)
    expected, references = case.gradients(experts_reference)
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert relative(y, expected) < bar
    for name, ours, reference in zip(NAMES, gradients, references, strict=True):
        assert (ours is None) == (reference is None), name
        if ours is not None and reference is not None:
            assert ours.dtype == reference.dtype, name
            assert reference.norm() > 0, name
            assert relative(ours, reference) < bar, name


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"packed": True, "hidden": 64, "inner": 32},
        {"packed": True, "hidden": 128, "inner": 64, "num_experts": 8},
        {"unused": 1},
        {"unused": 2, "packed": True},
        {"tokens": 1},
        {"tokens": 1, "top_k": 1},
        {"top_k": 1, "rank": 1, "num_experts": 8},
        {"rank": 16, "num_experts": 8, "top_k": 3},
        {"targets": "gate_up"},
        {"targets": "down"},
        {"targets": "none"},
        {"dropout": 0.3},
        {"dropout": 0.3, "targets": "down", "packed": True},
        {"dropout": 0.3, "targets": "gate_up", "unused": 0},
    ],
    ids=str,
)
def test_output_and_every_gradient_equal_the_reference(shape: dict[str, Any], keep: str) -> None:
    assert_equal_to_reference(make(**shape), partial(experts, keep=keep))


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize(
    "shape",
    [
        {"tokens": 64, "num_experts": 4},
        {"tokens": 64, "num_experts": 4, "packed": True},
        {"tokens": 64, "num_experts": 4, "packed": True, "dropout": 0.2},
        {"tokens": 1, "num_experts": 4, "packed": True},
        {"tokens": 3, "num_experts": 8, "top_k": 1, "dropout": 0.2},
        {"tokens": 97, "num_experts": 3, "unused": 2},
        {"tokens": 65, "num_experts": 8, "unused": 7, "top_k": 3, "dropout": 0.1},
    ],
    ids=str,
)
def test_bfloat16_stays_within_its_rounding_of_float32(shape: dict[str, Any], keep: str) -> None:
    """The masks of dropout are those of the reference in bfloat16: its rounding apart, the reference is exact."""
    case = make(hidden=128, inner=64, rank=8, dtype=torch.bfloat16, **shape)
    y, gradients = case.gradients(partial(experts, keep=keep))
    assert y.dtype == gradients[0].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients[1:])
    exact = dataclasses.replace(case, inputs=[tensor.float() for tensor in case.inputs]) if not case.dropout else case
    expected, references = exact.gradients(experts_reference)
    assert relative(y, expected) < 1e-2
    for name, ours, reference in zip(NAMES, gradients, references, strict=True):
        # The router's gradient of one token is a sum that nothing else evens out.
        assert relative(ours, reference) < (1.5e-2 if len(case.index) > 1 else 5e-2), name


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_padding_rows_reach_no_result(keep: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, with rows padded as for bfloat16 and every fresh tensor filled with rubbish."""
    case = make(tokens=40, num_experts=5, unused=4, dropout=0.2)
    monkeypatch.setattr(nf4_experts, "pads", lambda x_TH: True)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: new_empty(self, *size).fill_(1e30))
    assert_equal_to_reference(case, partial(experts, keep=keep))


@pytest.mark.parametrize("keep", ["inputs", "activations"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_no_tokens_give_an_empty_output_and_zero_gradients(dropout: float, keep: str) -> None:
    case = make(tokens=0, dropout=dropout)
    y, gradients = case.gradients(partial(experts, keep=keep))
    assert y.shape == (0, 10)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in case.inputs]
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2, 3, 4, 5), (0, 2, 3), (3, 4), (0, 1, 2, 3), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen: tuple[int, ...], keep: str) -> None:
    case = make(dropout=0.2)
    _, expected = case.gradients(experts_reference)
    inputs = [tensor.clone().requires_grad_(number not in frozen) for number, tensor in enumerate(case.inputs)]
    torch.manual_seed(1)
    y = case.run(partial(experts, keep=keep), inputs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
    for number, (name, tensor) in enumerate(zip(NAMES, inputs, strict=True)):
        assert (tensor.grad is None) == (number in frozen), name
        if tensor.grad is not None:
            assert relative(tensor.grad, expected[number]) < 1e-5, name


def test_with_all_frozen_the_output_needs_no_gradient_and_is_the_same() -> None:
    case = make()
    y, _ = case.gradients(experts)
    plain = case.run(experts, case.inputs)
    assert not plain.requires_grad
    assert torch.equal(plain, y)


def test_inputs_may_lie_strided_in_memory_and_indices_may_be_int32() -> None:
    case = make(tokens=20, hidden=12)
    expected, references = case.gradients(experts_reference)
    columns = torch.randn(12, 40)
    columns[:, ::2] = case.inputs[0].T
    x = columns.requires_grad_()
    router = case.inputs[1].T.contiguous().requires_grad_()
    index = case.index.T.contiguous().T.int()
    strided = dataclasses.replace(case, index=index, inputs=[])
    y = strided.run(experts, [x[:, ::2].T, router.T, *case.inputs[2:]])
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(dy.T.contiguous().T)
    assert relative(y, expected) < 1e-5
    assert relative(x.grad[:, ::2].T, references[0]) < 1e-5
    assert relative(router.grad.T, references[1]) < 1e-5


def stock(case: Case, implementation: str) -> torch.nn.Module:
    weights = case.weights
    config = MixtralConfig(
        hidden_size=weights.hidden, intermediate_size=weights.intermediate, num_local_experts=weights.num_experts
    )
    config._experts_implementation = implementation
    module = MixtralExperts(config)
    with torch.no_grad():
        module.gate_up_proj.copy_(weights.gate_up)
        module.down_proj.copy_(weights.down)
    return torch.nn.ModuleDict({"experts": module.requires_grad_(False)})


@pytest.mark.parametrize("targets", ["both", "gate_up", "down"])
@pytest.mark.parametrize("rank", [1, 16])
def test_output_and_every_gradient_equal_stock_peft_on_transformers_experts(rank: int, targets: str) -> None:
    case = make(num_experts=8, hidden=20, inner=12, rank=rank, targets=targets)
    wanted = {"both": ["gate_up_proj", "down_proj"], "gate_up": ["gate_up_proj"], "down": ["down_proj"]}[targets]
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=[f"experts.{name}" for name in wanted])
    model = get_peft_model(stock(case, "eager"), config).base_model.model["experts"]
    layers = {}
    while hasattr(model, "base_layer"):
        layers[{"gate_up_proj": "gate_up", "down_proj": "down"}[model.parameter_name]] = model
        model = model.base_layer
    theirs: list[torch.Tensor] = [tensor.clone().requires_grad_() for tensor in case.inputs[:2]]
    for name, (a, b) in {"gate_up": case.inputs[2:4], "down": case.inputs[4:]}.items():
        if name in layers:
            layer = layers[name]
            layer.scaling["default"] = {"gate_up": 0.5, "down": 0.25}[name]
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)
            theirs += [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    outermost = next(iter(layers.values()))
    expected = outermost(theirs[0], case.index, theirs[1])
    expected.backward(torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)))
    y, gradients = case.gradients(experts)
    assert relative(y, expected) < 1e-5
    ours = [gradient for gradient in gradients if gradient is not None]
    for mine, tensor in zip(ours, theirs, strict=True):
        assert tensor.grad.norm() > 0
        assert relative(mine, tensor.grad) < 1e-5


def test_without_an_adapter_it_is_transformers_own_experts() -> None:
    case = make(num_experts=8, hidden=20, inner=12, targets="none")
    module = stock(case, "eager")["experts"]
    y, _ = case.gradients(experts)
    assert relative(y, module(case.inputs[0], case.index, case.inputs[1])) < 1e-6


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_two_runs_agree_bit_for_bit(keep: str) -> None:
    case = make(tokens=200, num_experts=8, hidden=64, inner=32, rank=16, packed=True, dtype=torch.bfloat16, dropout=0.1)
    first, second = (case.gradients(partial(experts, keep=keep)) for _ in range(2))
    assert torch.equal(first[0], second[0])
    for ours, again in zip(first[1], second[1], strict=True):
        assert torch.equal(ours, again)


def test_keeping_activations_changes_no_bit() -> None:
    case = make(tokens=50, packed=True, hidden=64, inner=32, dropout=0.1)
    first, second = (case.gradients(partial(experts, keep=keep)) for keep in ("inputs", "activations"))
    assert torch.equal(first[0], second[0])
    for ours, again in zip(first[1], second[1], strict=True):
        assert torch.equal(ours, again)


def test_dropout_follows_the_seed_and_is_unbiased() -> None:
    case = make(tokens=6, dropout=0.4)
    plain = dataclasses.replace(case, dropout=0.0)
    torch.manual_seed(1)
    one, other = case.run(experts, case.inputs), case.run(experts, case.inputs)
    torch.manual_seed(1)
    assert torch.equal(one, case.run(experts, case.inputs))
    assert not torch.equal(one, other)

    # Only gate_up: h would make the mean of a product. Down alone is linear in its mask.
    down = dataclasses.replace(case, targets="down")
    base = dataclasses.replace(plain, targets="none").run(experts, case.inputs)
    mean = torch.stack([down.run(experts, case.inputs) - base for _ in range(3000)]).mean(0)
    expected = dataclasses.replace(plain, targets="down").run(experts, case.inputs) - base
    assert relative(mean, expected) < 0.05


def test_dropout_drops_elements_of_x_for_each_expert_anew() -> None:
    """With a zero base, A the identity and B into `up` only, h shows the dropped x itself."""
    hidden = inner = 32
    tokens = 400
    gate_up = torch.zeros(2, 2 * inner, hidden)
    gate_up[:, :inner] = torch.eye(inner) * 50  # silu(50) = 50
    weights = ExpertWeights(gate_up, torch.eye(inner).expand(2, -1, -1), None, None, 2, inner, hidden)
    into_up = torch.cat([torch.zeros(inner, inner), torch.eye(inner)]).unsqueeze(2).expand(-1, -1, 2)
    lora = ExpertLora(torch.eye(hidden).repeat(2, 1), into_up.reshape(2 * inner, 2 * hidden), 1.0, 0.25)
    shown = []
    torch.manual_seed(0)
    seeds = torch.get_rng_state()
    for expert in range(2):
        torch.set_rng_state(seeds)
        x, index = torch.ones(tokens, hidden), torch.full((tokens, 1), expert)
        shown.append(experts(x, index, torch.ones(tokens, 1), weights, lora) / 50)
    for factors in shown:
        assert 0.72 < factors.bool().float().mean() < 0.78
        torch.testing.assert_close(factors[factors > 0], torch.full_like(factors[factors > 0], 1 / 0.75))
    assert not torch.equal(*shown)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
# Blocks of 64 values and of 256 scales that end with the expert, only the first, and neither.
@pytest.mark.parametrize(
    "shape", [(3, 128, 128), (5, 64, 64), (3, 64, 32), (3, 20, 64), (5, 7, 6), (3, 5, 3), (4, 96, 48)]
)
def test_an_experts_slice_is_its_part_of_the_whole_tensor(
    shape: tuple[int, int, int], dtype: torch.dtype, storage: torch.dtype, nested: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape, dtype=dtype)
    packed, state = pack(weight, nested)
    whole = unpacked_by_hand(packed, state)
    assert relative(whole, weight) < 0.15
    if storage == torch.bfloat16:
        if packed.numel() % 2:
            packed = torch.cat([packed, packed.new_zeros(1, 1)])
        packed = packed.view(-1).view(torch.bfloat16).view(-1, 1)
    stack = Stack.of(packed, state)
    assert stack.holds(weight.numel())
    assert not stack.holds(weight.numel() + 64)
    assert not stack.holds(weight.numel() - 4)
    for number in range(shape[0]):
        part = stack.matrix(number, *shape[1:], dtype)
        assert part.shape == shape[1:]
        assert torch.equal(part, whole[number])


def test_aligned_slices_equal_what_bitsandbytes_unpacks() -> None:
    packed, state = pack(torch.randn(3, 128, 128))
    whole = dequantize_4bit(packed, state)
    stack = Stack.of(packed, state)
    assert torch.equal(torch.stack([stack.matrix(number, 128, 128, torch.float32) for number in range(3)]), whole)
    assert dequantize_blockwise(state.absmax, state.state2).dtype == torch.float32


def saved_elements(case: Case, keep: str) -> dict[int, int]:
    """Storage address to bytes of everything saved for the backward."""
    inputs = [tensor.clone().requires_grad_() for tensor in case.inputs]
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (saved.append(tensor), tensor)[1], lambda tensor: tensor
    ):
        y = case.run(partial(experts, keep=keep), inputs)
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    known = {tensor.untyped_storage().data_ptr() for tensor in (*inputs, case.index)}
    assert known <= held.keys()
    assert y.grad_fn is not None
    return {address: size for address, size in held.items() if address not in known}


@pytest.mark.parametrize("packed", [False, True])
def test_only_inputs_and_adapters_are_saved(packed: bool) -> None:
    case = make(tokens=100, hidden=64, inner=32, packed=packed, dropout=0.1)
    assert saved_elements(case, "inputs") == {}


def test_keeping_activations_saves_gate_and_up_of_every_slot_and_no_more() -> None:
    case = make(tokens=100, hidden=64, inner=32, packed=True, dropout=0.1)
    assert list(saved_elements(case, "activations").values()) == [100 * 2 * 2 * 32 * 4]


class Layers(torch.nn.Module):
    """Two residual mixture-of-experts blocks with stock routers, whose experts are ours."""

    def __init__(self, recompute: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        config = MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=4)
        blocks = [MixtralSparseMoeBlock(config) for _ in range(2)]
        self.cases = [make(num_experts=4, hidden=64, inner=32, packed=True, dropout=0.2) for _ in blocks]
        self.routers = torch.nn.ModuleList(block.gate for block in blocks)
        for router in self.routers:
            torch.nn.init.normal_(router.weight)
        adapters = [tensor for case in self.cases for tensor in case.inputs[2:]]
        self.adapters = torch.nn.ParameterList(adapters)
        self.recompute, self.calls = recompute, 0

    def block(self, number: int, x: torch.Tensor) -> torch.Tensor:
        _, weights, index = self.routers[number](x)
        a1, b1, a2, b2 = self.adapters[4 * number : 4 * number + 4]
        lora = ExpertLora(a1, b1, 0.5, 0.2), ExpertLora(a2, b2, 0.5, 0.2)
        return x + experts(x, index, weights, self.cases[number].weights, *lora)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(2):
            if self.recompute == "none":
                x = self.block(number, x)
                continue
            options: dict[str, Any] = {"use_reentrant": False}
            if self.recompute == "selective list":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, [EXPERTS_OP])
            if self.recompute == "selective policy":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, save_experts)
            x = checkpoint(self.block, number, x, **options)
        return x


def save_experts(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op is EXPERTS_OP else CheckpointPolicy.PREFER_RECOMPUTE


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the forwards of the op."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is EXPERTS_OP
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("recompute", "forwards"), [("none", 2), ("all", 4), ("selective list", 2), ("selective policy", 2)]
)
def test_checkpointing_changes_no_bit_and_a_policy_can_spare_the_experts(recompute: str, forwards: int) -> None:
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(4))
    results = []
    for how in ("none", recompute):
        layers = Layers(how)
        torch.manual_seed(9)
        leaf = x.clone().requires_grad_()
        with Counting() as counting:
            y = layers(leaf)
            y.square().sum().backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in layers.parameters())])
    assert counting.count == forwards
    assert len(results[0]) == 2 + 2 + 8
    for plain, again in zip(*results, strict=True):
        assert plain.norm() > 0
        assert torch.equal(plain, again)


def test_wrong_sizes_and_indices_are_refused() -> None:
    case = make()
    x, weights = case.inputs[:2]
    with pytest.raises(AssertionError, match="outside"):
        experts(x, case.index + 1, weights, case.weights)
    with pytest.raises(AssertionError):
        experts(x, case.index, weights[:, :1], case.weights)
    with pytest.raises(AssertionError):
        experts(x[:, :9], case.index, weights, case.weights)
    with pytest.raises(AssertionError):
        experts(x, case.index, weights, dataclasses.replace(case.weights, intermediate=6))
    with pytest.raises(AssertionError):
        experts(x, case.index, weights, dataclasses.replace(make(packed=True).weights, num_experts=4))


def test_row_counts_round_up_to_few_sizes() -> None:
    sizes = [rounded(count) for count in range(1, 4097)]
    assert all(0 <= size - count < max(32, count / 8) for count, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 50


def test_padding_reaches_over_the_next_experts_slots_and_lengthens_the_table() -> None:
    counts = [40, 0, 3, 1]
    assert parts(counts, False) == [(0, 40, slice(0, 40)), (2, 3, slice(40, 43)), (3, 1, slice(43, 44))]
    padded = parts(counts, True)
    assert padded == [(0, 40, slice(0, 64)), (2, 3, slice(40, 72)), (3, 1, slice(43, 75))]
    table = lengthened(torch.arange(1, 45), padded)
    assert table.tolist() == [*range(1, 45), *[0] * 31]
    assert lengthened(torch.arange(40), [(0, 3, slice(0, 32))]).tolist() == list(range(40))
