from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import VOCABULARY, dequantized_twin, write_model
from tests.training.jobs import tiny_recipe
from tune.adapters.coverage import check_coverage
from tune.adapters.lora import adapter_parameters, attach, read_adapter, resolve_targets
from tune.data.tokenizer import load_tokenizer
from tune.errors import ModelError
from tune.folder import RunFolder
from tune.models.load import load_base
from tune.recipe import schema
from tune.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "mistral")


def load(path: Path, **changes: str) -> object:
    return load_base(schema.Model(base=str(path), **{"dtype": "float32", **changes}), CPU)


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


def test_the_saved_adapter_gives_stock_peft_our_logits(tmp_path: Path, stories: Path) -> None:
    """A real model, trained, saved, and loaded by stock PEFT on stock transformers with the dequantised weights."""
    recipe = tiny_recipe(tmp_path, base=stories, train__max_steps=5, adapter__ranks={"down_proj": 2})
    result = train(recipe)
    assert result.loss_after < result.loss_before
    base = load_base(recipe.model, CPU)
    stock = dequantized_twin(base.model, stories)
    ids = torch.randint(3, 500, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = stock(input_ids=ids).logits
    ours = attach(base, recipe.adapter, recipe.model.base, seed=0)
    read_adapter(result.adapter, ours)
    theirs = PeftModel.from_pretrained(stock, result.adapter)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        assert relative(ours(input_ids=ids).logits, expected) < 1e-5
        assert relative(plain, expected) > 1e-2
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert set(config["rank_pattern"].values()) == {2}


def test_the_fixture_tells_its_story_through_our_loader(fixtures: Path, stories: Path) -> None:
    golden = (fixtures / "goldens" / "stories260K_greedy_200.txt").read_text()
    base = load_base(schema.Model(base=str(stories), dtype="float32", quantization="none"), CPU)
    out = base.model.generate(torch.tensor([[1]]), max_new_tokens=200, do_sample=False)
    assert load_tokenizer(str(stories)).decode(out[0], skip_special_tokens=True) == golden


def test_loading_packs_the_weights_as_bitsandbytes_does(base_path: Path) -> None:
    import bitsandbytes as bnb

    stock = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    ours = load(base_path).model
    for name, module in stock.named_modules():
        if name.endswith("_proj"):
            packed = bnb.nn.Params4bit(module.weight.detach(), quant_type="nf4", compress_statistics=True).to("cpu")
            mine = ours.get_submodule(name).weight
            assert torch.equal(mine, packed)
            assert torch.equal(mine.quant_state.absmax, packed.quant_state.absmax)
            assert mine.quant_state.nested


def test_the_start_depends_on_seed_and_name_alone(base_path: Path) -> None:
    def start(seed: int, **changes: str) -> dict[str, torch.Tensor]:
        model = attach(load(base_path, **changes), schema.Adapter(rank=4), "tiny", seed)
        return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model)}

    reference = start(0)
    torch.manual_seed(99)
    for other in (start(0), start(0, dtype="bfloat16"), start(0, quantization="none")):
        assert other.keys() == reference.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in reference.items())
    other = start(1)
    for name, tensor in reference.items():
        assert tensor.dtype == torch.float32
        if ".lora_A." in name:
            assert not torch.equal(tensor, other[name])
            assert 0.9 / 8 < tensor.abs().max() <= 1 / 8 or "down_proj" in name
        else:
            assert not tensor.any()
    starts = [tensor for name, tensor in reference.items() if "q_proj.lora_A" in name]
    assert not torch.equal(starts[0], starts[1]), "layers start differently"


def test_targets_ranks_and_exclusions_name_modules(base_path: Path) -> None:
    base = load(base_path)
    section = schema.Adapter(
        targets=["attention", "up_proj"], rank=8, ranks={"q_proj": 2}, exclude=["layers.0.self_attn.k_proj"]
    )
    ranks = resolve_targets(section, base, "tiny")
    last = lambda name: name.rsplit(".", 1)[-1]  # noqa: E731
    assert {last(name) for name in ranks} == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    assert len(ranks) == 9
    assert {rank for name, rank in ranks.items() if last(name) == "q_proj"} == {2}
    model = attach(base, section, "tiny", seed=0)
    check_coverage(base.model, ranks, "nf4")
    adapted = {name.split(".lora_A.")[0] for name, _ in adapter_parameters(model) if ".lora_A." in name}
    assert adapted == {f"base_model.model.{name}" for name in ranks}


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"targets": ["q_prj"]}, "Did you mean 'q_proj'"),
        ({"targets": ["embed_tokens"]}, "names no linear layer"),
        ({"targets": ["lm_head"]}, "names no linear layer"),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "leaves nothing"),
        ({"exclude": ["nothing"]}, "adapter.exclude"),
    ],
)
def test_a_target_that_names_nothing_is_refused(base_path: Path, section: dict[str, list[str]], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        resolve_targets(schema.Adapter(**section), load(base_path), "tiny")


def test_the_gate_finds_a_layer_that_stayed_unquantised_or_unadapted(base_path: Path) -> None:
    base = load(base_path)
    section = schema.Adapter(rank=4)
    claimed = resolve_targets(section, base, "tiny")
    attach(base, section, "tiny", seed=0)
    coverage = check_coverage(base.model, claimed, "nf4")
    assert coverage.lines == ("linears 14/14 nf4", "adapted 14/14")
    layer = base.model.model.layers[1]
    layer.mlp.up_proj.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"adapter.targets: 1 layers .*layers.1.mlp.up_proj"):
        check_coverage(base.model, claimed, "nf4")
    layer.self_attn.q_proj = torch.nn.Linear(64, 64)
    with pytest.raises(ModelError, match=r"model.quantization: nf4: 1 linear .*layers.1.self_attn.q_proj"):
        check_coverage(base.model, claimed, "nf4")


def test_the_gate_finds_weights_that_are_no_linear_layer(base_path: Path) -> None:
    """Experts by any name: what would stay in 16 bit under a model that calls itself 4-bit."""
    base = load(base_path)
    section = schema.Adapter(rank=4)
    claimed = resolve_targets(section, base, "tiny")
    attach(base, section, "tiny", seed=0)
    base.model.model.layers[0].mlp.experts = torch.nn.ParameterDict({"up": torch.nn.Parameter(torch.zeros(4, 8, 8))})
    with pytest.raises(ModelError, match=r"experts.*layers\.0\.mlp\.experts\.up"):
        check_coverage(base.model, claimed, "nf4")


def test_coverage_counts_the_bytes_that_are_stored(base_path: Path) -> None:
    base = load(base_path)
    section = schema.Adapter(rank=4)
    claimed = resolve_targets(section, base, "tiny")
    attach(base, section, "tiny", seed=0)
    coverage = check_coverage(base.model, claimed, "nf4")
    (q_proj,) = (kind for kind in coverage.kinds if kind.name == "q_proj")
    blocks = 64 * 64 // 64
    assert q_proj.bytes == 2 * (64 * 64 // 2 + blocks + 4)
    assert q_proj.adapter_parameters == 2 * 4 * (64 + 64)
    assert coverage.adapter_parameters == sum(p.numel() for _, p in adapter_parameters(base.model))


def test_an_adapter_is_continued_from_a_run_a_checkpoint_or_a_folder(tmp_path: Path) -> None:
    first = train(tiny_recipe(tmp_path, train__max_steps=4))
    starts = [tmp_path / "run", RunFolder(tmp_path / "run").checkpoint(4), first.adapter]
    for number, start in enumerate(starts):
        recipe = tiny_recipe(
            tmp_path,
            train__max_steps=1,
            adapter__start_from=str(start),
            data__eval=[str(tmp_path / "train.jsonl")],
            output=tmp_path / f"next{number}",
        )
        again = train(recipe)
        reference = train(
            tiny_recipe(
                tmp_path,
                train__max_steps=1,
                data__eval=[str(tmp_path / "train.jsonl")],
                output=tmp_path / f"new{number}",
            )
        )
        assert again.loss_before < reference.loss_before - 0.1


def test_several_adapters_and_switching_work_as_with_any_peft_model(base_path: Path) -> None:
    base = load(base_path)
    model = attach(base, schema.Adapter(rank=4), "tiny", seed=0)
    config = model.peft_config["default"]
    model.add_adapter("second", config)
    for name, parameter in model.named_parameters():
        if "lora_B.second" in name:
            torch.nn.init.normal_(parameter)
    ids = torch.randint(VOCABULARY, (1, 9))
    with torch.no_grad():
        first = model(input_ids=ids).logits
        model.set_adapter("second")
        second = model(input_ids=ids).logits
        model.base_model.set_adapter(["default", "second"])
        both = model(input_ids=ids).logits
        with model.disable_adapter():
            none = model(input_ids=ids).logits
    assert torch.equal(first, none), "B of the first is zero"
    assert relative(second, none) > 1e-2
    assert relative(both, second) < 1e-5
