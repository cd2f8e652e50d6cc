from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.adapters.mixtures import (
    adapted,
    choices,
    gradients,
    load,
    load_stock,
    logits,
    relative,
    stock,
    tokens,
    trained,
    write,
)
from tests.tiny import write_model
from tune.adapters.expert_lora import ParamWrapper, keep_activations
from tune.adapters.lora import (
    adapter_config_text,
    adapter_parameters,
    attach,
    linears,
    read_adapter,
    register,
    resolve_targets,
)
from tune.errors import ModelError
from tune.models.catalog import FAMILIES
from tune.models.load import recompute_activations
from tune.recipe import schema

MIXTURES = [name for name, family in FAMILIES.items() if family.experts]
FULL = schema.Router(train="full")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "mixtral")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize(
    ("experts", "top", "rank", "count", "intermediate", "targets"),
    [
        (8, 2, 16, 23, 128, ("attention", "experts")),
        (3, 2, 1, 23, 40, ("experts",)),
        (8, 1, 4, 5, 72, ("experts",)),  # fewer tokens than experts
        (3, 1, 16, 1, 40, ("experts",)),
        (4, 2, 4, 23, 40, ("gate_up_proj",)),
        (4, 2, 4, 23, 40, ("down_proj",)),
        (4, 2, 4, 23, 40, ("experts", "router")),
        (4, 2, 4, 23, 40, ("router",)),
    ],
)
def test_logits_and_every_gradient_equal_stock_peft_on_the_dequantised_experts(
    tmp_path: Path,
    quantization: str,
    experts: int,
    top: int,
    rank: int,
    count: int,
    intermediate: int,
    targets: tuple[str, ...],
) -> None:
    sizes = {"num_local_experts": experts, "num_experts_per_tok": top, "intermediate_size": intermediate}
    path = write_model(tmp_path / "base", "mixtral", **sizes)
    section = schema.Adapter(targets=targets, rank=rank)
    twin = stock(path, load(path, quantization))
    ours = adapted(load(path, quantization), section)
    theirs = load_stock(twin, write(ours, tmp_path / "adapter"), trainable=True)
    ids = tokens(count)
    expected = logits(theirs, ids)
    assert relative(logits(ours, ids), expected) < 1e-5
    with ours.disable_adapter(), theirs.disable_adapter():
        assert relative(logits(ours, ids), logits(theirs, ids)) < 1e-5
        assert relative(logits(ours, ids), expected) > 1e-2
    mine, reference = gradients(ours, ids), gradients(theirs, ids)
    assert mine.keys() == reference.keys()
    for name, gradient in mine.items():
        assert relative(gradient, reference[name]) < 1e-5, name
    assert any(gradient.any() for gradient in mine.values())


@pytest.mark.parametrize("family", [name for name in MIXTURES if name != "mixtral"])
def test_every_family_of_experts_equals_stock_peft(tmp_path: Path, family: str) -> None:
    path = write_model(tmp_path / "base", family)
    section = schema.Adapter(targets=("attention", "mlp", "router"), rank=4)
    twin = stock(path, load(path))
    ours = adapted(load(path), section)
    theirs = load_stock(twin, write(ours, tmp_path / "adapter"), trainable=True)
    ids = tokens(23)
    assert relative(logits(ours, ids), logits(theirs, ids)) < 1e-5
    mine, reference = gradients(ours, ids), gradients(theirs, ids)
    assert max(relative(mine[name], reference[name]) for name in reference) < 1e-5


@pytest.mark.parametrize("targets", [("attention", "experts"), ("experts", "router")])
def test_in_bfloat16_ours_is_as_near_to_float32_as_stock_peft_is(tmp_path: Path, targets: tuple[str, ...]) -> None:
    path = write_model(tmp_path / "base", "mixtral", dtype=torch.bfloat16)
    ours = adapted(load(path, "none", "bfloat16"), schema.Adapter(targets=targets, rank=4))
    adapter = write(ours, tmp_path / "adapter")
    rounded, exact = (
        load_stock(stock(path, dtype=dtype), adapter, trainable=True) for dtype in (torch.bfloat16, torch.float32)
    )
    ids = tokens(11, seed=4)
    assert choices(ours, ids, 2) == choices(rounded, ids, 2) == choices(exact, ids, 2), "choose another seed"
    expected = logits(exact, ids)
    assert relative(logits(ours, ids), expected) < 1.5 * relative(logits(rounded, ids), expected) < 0.03
    mine, theirs, reference = (gradients(model, ids) for model in (ours, rounded, exact))
    assert all(gradient.dtype == torch.float32 for gradient in mine.values())
    ours_off, theirs_off = ([relative(grads[n], reference[n]) for n in reference] for grads in (mine, theirs))
    assert sum(ours_off) < 1.3 * sum(theirs_off)
    assert max(ours_off) < 0.1


def test_ranks_per_target_and_rank_stabilised_scaling_are_pefts(mixtral: Path, tmp_path: Path) -> None:
    ranks = {"gate_up_proj": 2, "layers.1.mlp.experts": 3}
    ours = adapted(load(mixtral, "none"), schema.Adapter(targets=("attention", "experts"), rank=4, ranks=ranks))
    a = {name: p.shape[0] for name, p in adapter_parameters(ours) if "experts" in name and ".lora_A." in name}
    assert [rows // 4 for rows in a.values()] == [2, 4, 3, 3], "gate_up and down of each layer"
    theirs = load_stock(stock(mixtral), write(ours, tmp_path / "adapter"))
    assert relative(logits(ours, tokens(9)), logits(theirs, tokens(9))) < 1e-5

    both = []
    for base in (load(mixtral, "none").model, stock(mixtral)):
        names = ["experts.gate_up_proj", "experts.down_proj"]
        config = LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules=[], target_parameters=names)
        if not both:
            register(config, base)
        both.append(trained(get_peft_model(base, config)).eval())
    assert any(isinstance(module, ParamWrapper) for module in both[0].modules())
    both[1].load_state_dict(dict(adapter_parameters(both[0])), strict=False)
    assert relative(logits(both[0], tokens(9)), logits(both[1], tokens(9))) < 1e-5


def test_several_adapters_switching_disabling_and_unloading_work_as_with_any_peft_model(mixtral: Path) -> None:
    model = adapted(load(mixtral), schema.Adapter(targets=("attention", "experts", "router"), rank=4))
    ids = tokens(9)
    with model.disable_adapter():
        none = logits(model, ids)
    first = logits(model, ids)
    model.add_adapter("second", model.peft_config["default"])
    assert torch.equal(logits(model, ids), first)
    model.set_adapter("second")
    assert {name.split(".")[-2] for name, _ in adapter_parameters(model)} == {"second"}
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if ".lora_B." in name:
                parameter.zero_()
    assert relative(logits(model, ids), none) < 1e-6
    model.base_model.set_adapter(["default", "second"])
    assert relative(logits(model, ids), first) < 1e-5
    second = {name: parameter for name, parameter in model.named_parameters() if ".second." in name}
    with torch.no_grad():  # the same adapter twice is one with twice the B
        for name, parameter in second.items():
            parameter.copy_(model.get_parameter(name.replace(".second.", ".default.")))
    twice = logits(model, ids)
    model.set_adapter("default")
    with torch.no_grad():
        for name, parameter in adapter_parameters(model):
            if ".lora_B." in name:
                parameter.mul_(2)
    assert relative(twice, logits(model, ids)) < 1e-5
    model.delete_adapter("second")
    assert relative(logits(model, ids), twice) < 1e-5
    plain = model.unload()
    assert torch.equal(logits(plain, ids), none)
    assert not any("lora" in name for name, _ in plain.named_modules())


@pytest.mark.parametrize("targets", [("attention", "experts"), ("attention", "router")])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_merging_in_memory_says_what_to_do_instead(mixtral: Path, quantization: str, targets: tuple[str, ...]) -> None:
    model = adapted(load(mixtral, quantization), schema.Adapter(targets=targets, rank=4))
    before = logits(model, tokens(9))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ModelError, match="`tune merge RUN`"):
            merge()
    if quantization == "nf4":
        assert torch.equal(logits(model, tokens(9)), before), "nothing was merged before the refusal"


def test_a_dense_models_adapter_still_merges_as_peft_does(tmp_path: Path) -> None:
    model = adapted(load(write_model(tmp_path / "base", "mistral")), schema.Adapter(rank=4))
    with pytest.warns(UserWarning, match="4-bit"):
        model.merge_adapter()


def test_pefts_own_saving_and_loading_work_on_packed_experts(mixtral: Path, tmp_path: Path) -> None:
    section = schema.Adapter(targets=("attention", "experts", "router"), rank=4)
    model = adapted(load(mixtral), section)
    model.save_pretrained(tmp_path / "saved")
    config = LoraConfig.from_pretrained(tmp_path / "saved")
    again = load(mixtral).model
    register(config, again)
    reloaded = PeftModel.from_pretrained(again, tmp_path / "saved", config=config).eval()
    assert torch.equal(logits(reloaded, tokens(9)), logits(model, tokens(9)))


def test_dropout_is_on_the_input_of_a_in_training_alone_and_saved_as_none(mixtral: Path, tmp_path: Path) -> None:
    plain = adapted(load(mixtral), schema.Adapter(targets=("experts",), rank=4))
    model = adapted(load(mixtral), schema.Adapter(targets=("experts",), rank=4, dropout=0.5))
    ids = tokens(9)
    assert torch.equal(logits(model, ids), logits(plain, ids))
    model.train()
    torch.manual_seed(0)
    one, other = logits(model, ids), logits(model, ids)
    torch.manual_seed(0)
    assert torch.equal(logits(model, ids), one)
    assert relative(one, other) > 1e-2
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(logits(model, ids), logits(plain, ids)), "the base's own path is never dropped"
    assert json.loads(adapter_config_text(model))["lora_dropout"] == 0
    load_stock(stock(mixtral), write(model, tmp_path / "adapter"))
    keeping = adapted(load(mixtral), schema.Adapter(targets=("attention",), rank=4, dropout=0.5))
    assert json.loads(adapter_config_text(keeping))["lora_dropout"] == 0.5


def test_the_start_depends_on_seed_and_name_alone(mixtral: Path) -> None:
    def start(seed: int, *targets: str, init: str = "default", **changes: Any) -> dict[str, torch.Tensor]:
        model = attach(load(mixtral, **changes), schema.Adapter(targets=targets, rank=4, init=init), "tiny", seed)
        return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}

    everything = ("attention", "experts", "router")
    reference = start(0, *everything)
    torch.manual_seed(99)
    for changes in ({}, {"dtype": "bfloat16"}, {"quantization": "none"}, {"storage": torch.bfloat16}):
        other = start(0, *everything, **changes)
        assert other.keys() == reference.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in reference.items()), changes
    for name, tensor in reference.items():
        assert tensor.dtype == torch.float32
        assert tensor.any() == (".lora_A." in name)
    layer = "base_model.model.model.layers.0.mlp.experts."
    gate_up, down = (f"{layer}{inner}lora_A.default.weight" for inner in ("base_layer.", ""))
    assert 0.99 / 8 < reference[gate_up].abs().max() <= 1 / 8
    assert not torch.equal(reference[gate_up], start(1, *everything)[gate_up])
    assert not torch.equal(reference[gate_up], reference[gate_up.replace("layers.0", "layers.1")])
    # A stack starts the same, whatever is adapted beside it.
    assert torch.equal(start(0, "gate_up_proj")[down], reference[gate_up])
    assert torch.equal(start(0, "down_proj")[down], reference[down])
    gaussian = start(0, "experts", init="gaussian")[gate_up]
    assert 0.9 / 4 < gaussian.std() < 1.1 / 4, "one over the rank of an expert, not over that of all"


@pytest.mark.parametrize("keep", ["inputs", "activations"])
def test_recomputation_and_what_is_kept_change_no_gradient(mixtral: Path, keep: Any) -> None:
    section = schema.Adapter(targets=("attention", "experts", "router"), rank=4)
    reference = gradients(adapted(load(mixtral), section), tokens(23))
    base = load(mixtral)
    model = adapted(base, section)
    keep_activations(model, keep)
    recompute_activations(base.model)
    for name, gradient in gradients(model.train(), tokens(23)).items():
        assert relative(gradient, reference[name]) < 1e-6, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_router_trains_in_full_and_stock_peft_loads_it(tmp_path: Path, dtype: str) -> None:
    path = write_model(tmp_path / "base", "mixtral", dtype=getattr(torch, dtype))
    base = load(path, "none", dtype)
    section = schema.Adapter(targets=("attention", "experts"), rank=4)
    untouched = attach(base, section, "tiny", 3, FULL)
    whole = {name: parameter for name, parameter in adapter_parameters(untouched) if "modules_to_save" in name}
    assert len(whole) == 2
    ids = tokens(11)
    assert torch.equal(logits(untouched.eval(), ids), logits(load(path, "none", dtype).model, ids)), "starts as it was"
    ours = trained(untouched)
    adapter = write(ours, tmp_path / "adapter")
    theirs = load_stock(stock(path, dtype=getattr(torch, dtype)), adapter, trainable=True)
    assert choices(ours, ids, 2) == choices(theirs, ids, 2)
    assert relative(logits(ours, ids), logits(theirs, ids)) < (1e-5 if dtype == "float32" else 0.02)
    mine, reference = gradients(ours, ids), gradients(theirs, ids)
    for name, parameter in whole.items():
        assert parameter.dtype == torch.float32, "small steps would be lost in 16 bit"
        short = name.replace(".default", "")
        assert relative(mine[short], reference[short]) < (1e-5 if dtype == "float32" else 0.05)

    again = attach(load(path, "none", dtype), section, "tiny", 4, FULL).eval()
    read_adapter(adapter, again)
    assert torch.equal(logits(again, ids), logits(ours, ids))
    with pytest.raises(ModelError, match=r"trained whole .*router.train: full"):
        read_adapter(adapter, attach(load(path), section, "tiny", 4))


def test_names_of_experts_and_routers(mixtral: Path) -> None:
    base = load(mixtral)
    stacks = [
        f"model.layers.{layer}.mlp.experts.{stack}" for layer in (0, 1) for stack in ("gate_up_proj", "down_proj")
    ]
    gates = [f"model.layers.{layer}.mlp.gate.weight" for layer in (0, 1)]

    def names(*targets: str, router: schema.Router | None = None, **changes: Any) -> dict[str, int]:
        return resolve_targets(schema.Adapter(targets=targets, rank=4, **changes), base, "tiny", router)

    assert names("experts") == names("mlp") == dict.fromkeys(stacks, 4)
    assert names("mlp.experts") == dict.fromkeys(stacks, 4)
    assert names("router") == names("mlp.gate") == dict.fromkeys(gates, 4)
    assert names("down_proj").keys() == {stacks[1], stacks[3]}
    assert names("experts", exclude=["layers.0.mlp.experts"]).keys() == set(stacks[2:])
    assert names("experts", ranks={"down_proj": 2})[stacks[1]] == 2
    assert set(names("attention", "mlp", "router")) == {*linears(base.model), *stacks, *gates}
    assert names("attention", router=FULL) == names("attention") | dict.fromkeys(gates, 0)
    only = adapted(load(mixtral), schema.Adapter(targets=("experts",), rank=4, exclude=["layers.0.mlp.experts"]))
    assert json.loads(adapter_config_text(only))["target_parameters"] == sorted(stacks[2:])
    assert all("layers.1." in name for name, _ in adapter_parameters(only))


@pytest.mark.parametrize(
    ("family", "section", "router", "words"),
    [
        ("mistral", {"targets": ["experts"]}, None, r"has no experts .*attention, mlp\."),
        ("mistral", {"targets": ["router"]}, None, "has no router"),
        ("mistral", {}, FULL, "router.train: full: tiny has no router"),
        ("mixtral", {"targets": ["gate_up_prj"]}, None, r"no linear layer, experts or router .*'gate_up_proj'"),
        ("mixtral", {"targets": ["router"]}, FULL, "Choose one"),
        ("mixtral", {"targets": ["router"], "dropout": 0.1}, None, "adapter.dropout: does not reach"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    tmp_path: Path, family: str, section: dict[str, Any], router: schema.Router | None, words: str
) -> None:
    base = load(write_model(tmp_path / "base", family))
    with pytest.raises(ModelError, match=words):
        resolve_targets(schema.Adapter(**section), base, "tiny", router)
