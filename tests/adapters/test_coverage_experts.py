from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.adapters.mixtures import load
from tests.tiny import write_model
from tune.adapters.coverage import Coverage, check_coverage
from tune.adapters.lora import adapter_parameters, attach, resolve_targets
from tune.errors import ModelError
from tune.models.load import LoadedBase
from tune.recipe import schema

FULL = schema.Router(train="full")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "mixtral", num_local_experts=8)


def prepare(
    path: Path, *targets: str, quantization: str = "nf4", router: schema.Router | None = None, **changes: object
) -> tuple[LoadedBase, dict[str, int]]:
    base = load(path, quantization, "bfloat16")
    section = schema.Adapter(targets=targets, rank=4, **changes)
    claimed = resolve_targets(section, base, "tiny", router)
    attach(base, section, "tiny", 0, router)
    return base, claimed


def coverage(path: Path, *targets: str, quantization: str = "nf4", **changes: object) -> Coverage:
    base, claimed = prepare(path, *targets, quantization=quantization, **changes)
    return check_coverage(base.model, claimed, quantization)


def test_the_lines_count_every_expert_of_every_layer(mixtral: Path) -> None:
    everything = coverage(mixtral, "attention", "experts")
    assert everything.lines == ("linears 8/8 nf4", "experts 16/16 nf4", "adapted 24/24")
    assert coverage(mixtral, "attention").lines == ("linears 8/8 nf4", "experts 16/16 nf4", "adapted 8/8")
    assert coverage(mixtral, "down_proj").lines[-1] == "adapted 16/16", "an expert counts once, whatever of it is"
    assert coverage(mixtral, "experts", exclude=["layers.0.mlp.experts"]).lines[-1] == "adapted 8/8"
    assert coverage(mixtral, "experts", "router").lines[-1] == "adapted 18/18"
    assert coverage(mixtral, "attention", router=FULL).lines[-1] == "adapted 10/10"
    dense = coverage(mixtral, "attention", "mlp", quantization="none")
    assert dense.lines == ("linears 8/8 bfloat16", "experts 16/16 bfloat16", "adapted 24/24")


def test_bytes_and_parameters_are_those_in_memory(mixtral: Path) -> None:
    base, claimed = prepare(mixtral, "attention", "experts", "router")
    table = check_coverage(base.model, claimed, "nf4")
    kinds = {kind.name: kind for kind in table.kinds}
    assert list(kinds) == ["q_proj", "k_proj", "v_proj", "o_proj", "experts", "router"]
    elements = [8 * 256 * 64, 8 * 64 * 128]
    packed = sum(count // 2 + count // 64 + 4 * -(-count // 64 // 256) for count in elements)
    assert kinds["experts"].bytes == 2 * packed
    assert kinds["experts"].adapter_parameters == 2 * 8 * 4 * (64 + 256 + 128 + 64)
    assert kinds["router"].bytes == 2 * 8 * 64 * 2
    assert kinds["router"].adapter_parameters == 2 * 4 * (8 + 64)
    assert (kinds["router"].layers, kinds["router"].quantized, kinds["router"].adapted) == (2, 0, 2)
    trained = sum(parameter.numel() for _, parameter in adapter_parameters(base.model))
    assert table.adapter_parameters == trained == sum(kind.adapter_parameters for kind in table.kinds)
    rest = 2 * 384 * 64 * 2 + (2 * 2 + 1) * 64 * 2  # embeddings, head and norms
    assert table.frozen_bytes == sum(kind.bytes for kind in table.kinds) + rest
    assert json.loads(json.dumps(table.to_json()))["lines"] == list(table.lines)

    full = coverage(mixtral, "attention", router=FULL)
    assert full.frozen_bytes == table.frozen_bytes, "a router that trains stands beside the frozen one"
    assert {kind.name: kind for kind in full.kinds}["router"].adapter_parameters == 2 * 8 * 64


def test_a_claim_that_the_model_does_not_keep_is_refused_by_name(mixtral: Path) -> None:
    base, claimed = prepare(mixtral, "attention", "experts")
    inner = base.model.model.layers[1].mlp.experts.base_layer
    inner.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"adapter.targets: 1 .*layers\.1\.mlp\.experts\.gate_up_proj\. Nothing"):
        check_coverage(base.model, claimed, "nf4")
    base.model.model.layers[1].mlp.experts = inner.base_layer
    with pytest.raises(ModelError, match=r"adapter.targets: 2 .*experts\.gate_up_proj, .*experts\.down_proj"):
        check_coverage(base.model, claimed, "nf4")

    base, claimed = prepare(mixtral, "attention", router=FULL)
    base.model.model.layers[0].mlp.gate = base.model.model.layers[0].mlp.gate.original_module
    with pytest.raises(ModelError, match=r"router.train: full: 1 routers do not train: model\.layers\.0\.mlp\.gate"):
        check_coverage(base.model, claimed, "nf4")

    base, claimed = prepare(mixtral, "experts")
    with pytest.raises(ModelError, match=r"adapter.targets: 1 .*layers\.1\.mlp\.gate\.weight"):
        check_coverage(base.model, {**claimed, "model.layers.1.mlp.gate.weight": 4}, "nf4")
    with pytest.raises(ModelError, match=r"experts\.down_proj"):
        check_coverage(base.model, {**claimed, "model.layers.1.mlp.experts.down_proj": 8}, "nf4")


def test_experts_that_stayed_in_16_bit_are_refused_by_name(mixtral: Path) -> None:
    base, claimed = prepare(mixtral, "attention")
    dense = load(mixtral, "none", "bfloat16").model.model.layers[1].mlp
    base.model.model.layers[1].mlp.experts = dense.experts
    with pytest.raises(ModelError, match=r"model.quantization: nf4: 1 layers' experts .*layers\.1\.mlp\.experts\."):
        check_coverage(base.model, claimed, "nf4")

    base, claimed = prepare(mixtral, "attention")
    base.model.model.layers[0].mlp.experts.down_state = None
    with pytest.raises(ModelError, match=r"layers' experts .*layers\.0\.mlp\.experts\."):
        check_coverage(base.model, claimed, "nf4")

    base, claimed = prepare(mixtral, "attention")
    base.model.model.layers[0].mlp.more = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(8, 4, 4))})
    with pytest.raises(ModelError, match=r"no linear layer .*layers\.0\.mlp\.more\.w"):
        check_coverage(base.model, claimed, "nf4")
