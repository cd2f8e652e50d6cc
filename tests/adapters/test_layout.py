from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.adapters.mixtures import adapted, load, load_stock, logits, relative, stock, tokens, write
from tests.tiny import write_model
from tune.adapters.files import AdapterFiles, read_files
from tune.adapters.layout import expert_names, read_as_stock, to_per_expert, to_stock
from tune.adapters.lora import attach, read_adapter
from tune.errors import ModelError
from tune.models.catalog import FAMILIES
from tune.recipe import schema

MIXTRAL = FAMILIES["mixtral"].per_expert
assert MIXTRAL is not None

SECTIONS: dict[str, dict[str, Any]] = {
    "attention and experts": {"targets": ["attention", "experts"]},
    "experts alone": {"targets": ["experts"]},
    "gate_up alone": {"targets": ["gate_up_proj"]},
    "down alone": {"targets": ["down_proj"]},
    "with a router": {"targets": ["attention", "experts", "router"], "ranks": {"router": 3}},
    "ranks": {
        "targets": ["attention", "experts"],
        "ranks": {"gate_up_proj": 2, "layers.1.mlp.experts.down_proj": 3, "q_proj": 5},
    },
}


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "mixtral", num_local_experts=3, intermediate_size=40)


def put(files: AdapterFiles, folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(files.config))
    save_file(files.tensors, folder / "adapter_model.safetensors")
    return folder


def equal(ours: AdapterFiles, other: AdapterFiles) -> bool:
    same = ours.tensors.keys() == other.tensors.keys()
    return same and all(torch.equal(tensor, other.tensors[name]) for name, tensor in ours.tensors.items())


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_per_expert_is_the_same_model_for_stock_peft_and_comes_back_the_same_bytes(
    mixtral: Path, tmp_path: Path, section: dict[str, Any], stabilised: bool
) -> None:
    files = read_files(write(adapted(load(mixtral, "none"), schema.Adapter(rank=4, **section)), tmp_path / "stock"))
    if stabilised:
        files.config["use_rslora"] = True
        (tmp_path / "stock" / "adapter_config.json").write_text(json.dumps(files.config))
    apart = read_files(put(to_per_expert(files, MIXTRAL), tmp_path / "apart"))
    assert (files.layout, apart.layout) == ("stock", "per-expert")
    base = logits(stock(mixtral), tokens(17))
    expected = logits(load_stock(stock(mixtral), tmp_path / "stock"), tokens(17))
    assert relative(base, expected) > 0.1
    assert relative(logits(load_stock(stock(mixtral), tmp_path / "apart"), tokens(17)), expected) < 1e-5
    back = to_stock(apart, MIXTRAL)
    assert equal(back, files)
    assert back.config == files.config


def test_a_layer_whose_experts_are_left_out_stays_out(mixtral: Path, tmp_path: Path) -> None:
    section = schema.Adapter(targets=("attention", "experts"), rank=4, exclude=["layers.0.mlp.experts"])
    files = read_files(write(adapted(load(mixtral, "none"), section), tmp_path / "stock"))
    apart = to_per_expert(files, MIXTRAL)
    back = to_stock(apart, MIXTRAL)
    assert equal(back, files)
    assert back.config == files.config
    expected = logits(load_stock(stock(mixtral), tmp_path / "stock"), tokens(17))
    # PEFT's own conversion can leave out no layer: it adds one that changes nothing, and says that it has no values.
    with pytest.warns(UserWarning, match=r"missing adapter keys.*layers\.0\.mlp\.experts"):
        theirs = load_stock(stock(mixtral), put(apart, tmp_path / "apart"))
    assert relative(logits(theirs, tokens(17)), expected) < 1e-5


def test_our_logits_are_stock_pefts_from_either_layout(tmp_path: Path) -> None:
    """On packed experts, of every family."""
    for name, family in FAMILIES.items():
        if family.per_expert is None:
            continue
        path = write_model(tmp_path / name, name)
        section = schema.Adapter(targets=("attention", "experts"), rank=4)
        ours = adapted(load(path), section)
        files = read_files(write(ours, tmp_path / f"{name}-stock"))
        put(to_per_expert(files, family.per_expert), tmp_path / f"{name}-apart")
        for layout in ("stock", "apart"):
            theirs = load_stock(stock(path, load(path)), tmp_path / f"{name}-{layout}")
            assert relative(logits(ours, tokens(17)), logits(theirs, tokens(17))) < 1e-5, (name, layout)
            again = attach(load(path), section, "tiny", 8)
            read_adapter(tmp_path / f"{name}-{layout}", again)
            assert torch.equal(logits(again.eval(), tokens(17)), logits(ours, tokens(17))), (name, layout)


def test_a_mixtrals_experts_have_the_names_that_servers_know(mixtral: Path, tmp_path: Path) -> None:
    section = schema.Adapter(targets=("q_proj", "experts", "router"), rank=4)
    files = to_per_expert(read_files(write(adapted(load(mixtral), section), tmp_path / "stock")), MIXTRAL)
    moe = "base_model.model.model.layers.1.block_sparse_moe."
    shapes = {name.removeprefix(moe): list(t.shape) for name, t in files.tensors.items() if name.startswith(moe)}
    experts = {
        f"experts.{expert}.{part}.lora_{half}.weight": shape
        for expert in range(3)
        for part, inside, outside in (("w1", 64, 40), ("w2", 40, 64), ("w3", 64, 40))
        for half, shape in (("A", [4, inside]), ("B", [outside, 4]))
    }
    assert shapes == experts | {"gate.lora_A.weight": [4, 64], "gate.lora_B.weight": [3, 4]}
    assert files.config["target_modules"] == ["gate", "q_proj", "w1", "w2", "w3"]
    assert not files.config["target_parameters"]
    assert not files.config["rank_pattern"]
    # Each expert's ΔW is what stock PEFT makes of the stack: A expert-major, B rank-major with the expert fastest.
    whole = read_files(tmp_path / "stock").tensors
    a, b = (whole[f"base_model.model.model.layers.1.mlp.experts.base_layer.lora_{half}.weight"] for half in "AB")
    delta = torch.einsum("ore,eri->eoi", b.reshape(80, 4, 3), a.reshape(3, 4, 64))
    for expert in range(3):
        for part, rows in (("w1", slice(0, 40)), ("w3", slice(40, 80))):
            one = {half: files.tensors[f"{moe}experts.{expert}.{part}.lora_{half}.weight"] for half in "AB"}
            assert torch.allclose(one["B"] @ one["A"], delta[expert, rows], atol=1e-6)


def test_an_adapter_trained_expert_by_expert_is_continued_at_twice_the_rank(mixtral: Path, tmp_path: Path) -> None:
    """w1 and w3 with an A of their own, as transformers 4 and PEFT trained them."""
    section = schema.Adapter(targets=("attention", "experts"), rank=4)
    files = to_per_expert(read_files(write(adapted(load(mixtral, "none"), section), tmp_path / "stock")), MIXTRAL)
    for name, tensor in files.tensors.items():
        if ".w3.lora_A." in name:
            tensor.normal_(0, 0.1)
    put(files, tmp_path / "apart")
    expected = logits(load_stock(stock(mixtral), tmp_path / "apart"), tokens(17))
    ranks = {"gate_up_proj": 8}
    again = attach(load(mixtral, "none"), section.model_copy(update={"ranks": ranks}), "tiny", 3)
    read_adapter(tmp_path / "apart", again)
    assert relative(logits(again.eval(), tokens(17)), expected) < 1e-5
    stacked = put(to_stock(files, MIXTRAL), tmp_path / "again")
    assert relative(logits(load_stock(stock(mixtral), stacked), tokens(17)), expected) < 1e-5
    with pytest.raises(ModelError, match="has another shape for 4 tensors"):
        read_adapter(tmp_path / "apart", attach(load(mixtral, "none"), section, "tiny", 3))
    files.config["use_rslora"] = True
    with pytest.raises(ModelError, match="use_rslora"):
        to_stock(files, MIXTRAL)


def damaged(files: AdapterFiles, drop: str = "", **config: Any) -> AdapterFiles:
    tensors = {name: tensor for name, tensor in files.tensors.items() if not drop or not re.search(drop, name)}
    return AdapterFiles(files.folder, {**files.config, **config}, tensors)


def test_what_does_not_fit_together_is_refused_by_name(mixtral: Path, tmp_path: Path) -> None:
    section = schema.Adapter(targets=("attention", "experts"), rank=4)
    files = read_files(write(adapted(load(mixtral), section), tmp_path / "stock"))
    apart = to_per_expert(files, MIXTRAL)
    for broken, words in (
        (damaged(apart, r"layers\.1\..*experts\.2\.w2\.lora_A"), r"lacks 1 .*layers\.1\.mlp\.experts\.2\.w2\.lora_A"),
        (damaged(apart, r"layers\.1\..*w3"), r"lacks 6 tensors .*w3"),
        (damaged(apart, modules_to_save=["lm_head"]), "modules_to_save .*tune merge"),
        (damaged(apart, use_dora=True), "use_dora"),
    ):
        with pytest.raises(ModelError, match=words):
            to_stock(broken, MIXTRAL)
    misshapen = dict(apart.tensors)
    misshapen["base_model.model.model.layers.0.block_sparse_moe.experts.1.w2.lora_A.weight"] = torch.zeros(3, 40)
    with pytest.raises(ModelError, match="different shapes"):
        to_stock(AdapterFiles(apart.folder, apart.config, misshapen), MIXTRAL)
    for broken, words in (
        (damaged(files, r"experts\.lora_B"), "missing"),
        (damaged(files, r=5), r"does not fit its rank of 5"),
        (damaged(files, "experts"), "adapts no experts"),
        (damaged(files, "base_layer", target_parameters=[]), "target_parameters .*does not say which"),
        (damaged(files, alpha_pattern={"q_proj": 3}), "alpha_pattern"),
        (damaged(files, peft_type="IA3", r=None), "no LoRA"),
    ):
        with pytest.raises(ModelError, match=words):
            to_per_expert(broken, MIXTRAL)
    put(apart, tmp_path / "apart")
    for family in (None, FAMILIES["mistral"]):
        with pytest.raises(ModelError, match="not known for this base"):
            read_as_stock(tmp_path / "apart", family)
    with pytest.raises(ModelError, match="such as mistralai/Mixtral"):
        expert_names(FAMILIES["llama"], tmp_path)


def test_ranks_that_differ_from_the_recipes_are_told(mixtral: Path, tmp_path: Path) -> None:
    """Also where the shapes agree: a config that says otherwise scales otherwise."""
    section = schema.Adapter(targets=("experts",), rank=4)
    folder = write(adapted(load(mixtral), section), tmp_path / "stock")
    read_adapter(folder, attach(load(mixtral), section, "tiny", 3))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 6}))
    with pytest.raises(ModelError, match=r"its r is 6, the recipe's adapter\.rank is 4"):
        read_adapter(folder, attach(load(mixtral), section, "tiny", 3))
    # The same ranks, said another way.
    patterns = {"gate_up_proj": 4, "experts.down_proj": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"r": 6, "rank_pattern": patterns}))
    read_adapter(folder, attach(load(mixtral), section, "tiny", 3))
