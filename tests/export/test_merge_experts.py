"""A merged mixture of experts is the trained one, whether its experts were stored one by one or stacked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.merges import Made, change_tensors, made, relative, tensors_of, weight_files
from tune.errors import UntrustworthyError
from tune.export import deltas
from tune.export.deltas import StackDelta
from tune.export.merge import merge, prove_again

EXPERTS = ["attention", "experts"]


def stack_experts(base: Path) -> None:
    """Store all experts of a layer in one tensor, as transformers holds them."""
    from transformers import AutoModelForCausalLM

    dtype = next(iter(load_file(base / "model.safetensors").values())).dtype
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def lora_layers(model: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize("stored", [None, stack_experts])
def test_stock_transformers_and_stock_peft_agree_with_it(
    tmp_path: Path, family: str, stored: Callable[[Path], None] | None
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = made(family, spoil=stored, adapter__targets=EXPERTS)
    folder = merge(run.run.root, tmp_path / "out").folder
    assert [path.name for path in weight_files(folder)] == [path.name for path in weight_files(run.base)]
    assert {n: t.shape for n, t in tensors_of(folder).items()} == {n: t.shape for n, t in tensors_of(run.base).items()}
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    merged = logits_of(AutoModelForCausalLM.from_pretrained(folder, **options))
    base = AutoModelForCausalLM.from_pretrained(run.base, **options)
    plain = logits_of(base)
    adapted = logits_of(PeftModel.from_pretrained(base, str(run.run.adapter)))
    assert relative(merged, adapted) < 1e-5
    assert relative(merged, plain) > 1e-3


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT looks among modules alone
def test_rank_stabilised_adapters_are_those_of_stock_peft_and_merge(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = made("mixtral", adapter__targets=EXPERTS, adapter__rslora=True, adapter__ranks={"experts": 9})
    assert json.loads((run.run.adapter / "adapter_config.json").read_text())["use_rslora"] is True
    done = merge(run.run.root, tmp_path / "out")
    assert done.proof.holds
    options: dict[str, Any] = {"dtype": torch.float32, "experts_implementation": "eager"}
    merged = logits_of(AutoModelForCausalLM.from_pretrained(done.folder, **options))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base, **options), str(run.run.adapter))
    scalings = {module.r["default"]: module.scaling["default"] for module in lora_layers(model)}
    assert scalings == {4: 32 / 2, 9: 32 / 3}
    assert relative(merged, logits_of(model)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("base", ["original", "quantized"])
@pytest.mark.parametrize("stored", [None, stack_experts])
@pytest.mark.parametrize("targets", [EXPERTS, ["gate_up_proj"], ["down_proj", "router"]])
def test_every_way_is_proven(tmp_path: Path, dtype: str, base: str, stored: Any, targets: list[str]) -> None:
    run = made("mixtral", dtype, spoil=stored, adapter__targets=targets)
    assert merge(run.run.root, tmp_path / "out", base).proof.holds  # type: ignore[arg-type]


def test_both_ways_of_storing_hold_the_same_numbers(tmp_path: Path) -> None:
    apart = made("mixtral", "bfloat16", adapter__targets=EXPERTS)
    stacked = made("mixtral", "bfloat16", spoil=stack_experts, adapter__targets=EXPERTS)
    for base in ("original", "quantized"):
        one = tensors_of(merge(apart.run.root, tmp_path / f"one-{base}", base).folder)  # type: ignore[arg-type]
        two = tensors_of(merge(stacked.run.root, tmp_path / f"two-{base}", base).folder)  # type: ignore[arg-type]
        for layer in range(2):
            block = f"model.layers.{layer}"
            for expert in range(4):
                w1, w2, w3 = (
                    one[f"{block}.block_sparse_moe.experts.{expert}.{name}.weight"] for name in ("w1", "w2", "w3")
                )
                assert torch.equal(torch.cat([w1, w3]), two[f"{block}.mlp.experts.gate_up_proj"][expert])
                assert torch.equal(w2, two[f"{block}.mlp.experts.down_proj"][expert])


def test_the_4_bit_experts_are_those_that_training_loads(tmp_path: Path) -> None:
    from tune.export.subject import find_subject
    from tune.kernels.nf4_linear import dequantize
    from tune.models.experts import STACKS
    from tune.models.load import load_base

    run = made("mixtral", "bfloat16", adapter__targets=EXPERTS)
    subject = find_subject(run.run.root, "quantized")
    loaded = load_base(subject.recipe.model, torch.device("cpu")).model
    weights = subject.weights()
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.experts"
        module = loaded.get_submodule(name)
        for stack in STACKS:
            state = module.state_of(stack)
            dense = dequantize(module.get_parameter(stack), state, torch.float32).view(module.shape_of(stack))
            assert torch.equal(weights.whole(subject.model.stored(subject.checkpoint, name, stack)), dense)


def test_a_router_that_trained_in_full_is_merged(tmp_path: Path) -> None:
    run = made("mixtral", adapter__targets=EXPERTS, router__train="full")
    folder = merge(run.run.root, tmp_path / "out").folder
    name = "model.layers.0.block_sparse_moe.gate.weight"
    trained = load_file(run.adapter_file)["base_model.model.model.layers.0.mlp.gate.weight"]
    assert torch.equal(tensors_of(folder)[name], trained)
    assert not torch.equal(tensors_of(run.base)[name], trained)


def expert(number: int, matrix: str, layer: int = 0) -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{number}.{matrix}.weight"


def swapped(one: str, two: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()

    return swap


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (swapped(expert(0, "w1"), expert(1, "w1")), expert(0, "w1")),
        (swapped(expert(2, "w1", 1), expert(2, "w3", 1)), expert(2, "w3", 1)),
        (swapped("model.layers.0.block_sparse_moe.gate.weight", "model.layers.1.block_sparse_moe.gate.weight"), "gate"),
    ],
    ids=["two experts", "gate and up", "routers"],
)
def test_files_in_the_wrong_place_fail_the_proof(tmp_path: Path, dtype: str, fault: Any, named: str) -> None:
    run = made("mixtral", dtype, adapter__targets=EXPERTS)
    folder = merge(run.run.root, tmp_path / "out").folder
    (weights,) = weight_files(folder)
    change_tensors(weights, fault)
    with pytest.raises(UntrustworthyError, match="weights: 2 tensors") as caught:
        prove_again(run.run.root, folder)
    assert named in str(caught.value)


def without_one_expert(right: Any) -> Any:
    def rows(self: StackDelta, number: int, start: int = 0, stop: int | None = None) -> Any:
        found = right(self, number, start, stop)
        return deltas.Delta(found.a_RI * (number != 1), found.b_OR, found.scaling)

    return rows


def with_b_read_expert_major(right: Any) -> Any:
    def rows(self: StackDelta, number: int, start: int = 0, stop: int | None = None) -> Any:
        found = right(self, number, start, stop)
        b = self.b_OQ.reshape(self.b_OQ.shape[0], self.experts, -1)[start:stop, number]
        return deltas.Delta(found.a_RI, b, found.scaling)

    return rows


def with_gate_and_up_swapped(right: Any) -> Any:
    def rows(self: StackDelta, number: int, start: int = 0, stop: int | None = None) -> Any:
        half = self.b_OQ.shape[0] // 2
        other = StackDelta(self.a_QI, self.b_OQ.roll(half, 0), self.scaling, self.experts)
        return right(other if half != 32 else self, number, start, stop)

    return rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stored", [None, stack_experts])
@pytest.mark.parametrize("fault", [without_one_expert, with_b_read_expert_major, with_gate_and_up_swapped])
def test_a_wrong_delta_fails_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, stored: Any, fault: Any
) -> None:
    run = made("mixtral", dtype, spoil=stored, adapter__targets=EXPERTS)
    monkeypatch.setattr(StackDelta, "expert", fault(StackDelta.expert))
    with pytest.raises(UntrustworthyError, match="are not the base plus the adapter"):
        merge(run.run.root, tmp_path / "out")
    assert (tmp_path / "out/UNPROVEN").exists()
    assert json.loads((tmp_path / "out/merge-proof.json").read_text())["verdict"] == "failed"


def test_a_merge_of_many_shards_keeps_them(tmp_path: Path) -> None:
    run: Made = made("mixtral", "bfloat16", True, adapter__targets=EXPERTS)
    folder = merge(run.run.root, tmp_path / "out").folder
    assert len(weight_files(run.base)) > 2
    assert [(p.name, p.stat().st_size) for p in weight_files(folder)] == [
        (p.name, p.stat().st_size) for p in weight_files(run.base)
    ]
