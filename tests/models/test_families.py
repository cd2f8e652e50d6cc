"""The contract of every entry of FAMILIES, on a tiny random model of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.tiny import VOCABULARY, dequantized_twin, write_model
from tune.adapters.coverage import check_coverage
from tune.adapters.lora import (
    ADAPTER,
    adapter_bytes,
    adapter_config_text,
    adapter_parameters,
    attach,
    linears,
    resolve_targets,
)
from tune.errors import ModelError
from tune.models.catalog import FAMILIES
from tune.models.hub import fingerprint_base, read_config
from tune.models.load import check_length, load_base
from tune.recipe import schema

DENSE = [name for name, family in FAMILIES.items() if not family.experts]


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("targets", [("attention", "mlp"), ("attention",)])
def test_every_gradient_equals_stock_peft_on_the_dequantised_weights(
    tmp_path: Path, family: str, targets: tuple[str, ...]
) -> None:
    """All-linear and attention-only, before and after an evaluation with the adapter on and off."""
    path = write_model(tmp_path / "base", family)
    section = schema.Adapter(targets=targets, rank=4)
    base = load_base(schema.Model(base=str(path), dtype="float32"), torch.device("cpu"))
    claimed = resolve_targets(section, base, "tiny")
    ours = attach(base, section, "tiny", seed=3)
    check_coverage(base.model, claimed, "nf4")
    for name, parameter in adapter_parameters(ours):
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(adapter_config_text(ours))
    (adapter / "adapter_model.safetensors").write_bytes(adapter_bytes(ours))
    stock = PeftModel.from_pretrained(dequantized_twin(base_weights(path), path), adapter, is_trainable=True)

    ids = torch.randint(VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(1))
    ours.eval(), stock.eval()
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        assert relative(ours(input_ids=ids).logits, expected) < 1e-5
        with ours.disable_adapter(), stock.disable_adapter():
            assert relative(ours(input_ids=ids).logits, stock(input_ids=ids).logits) < 1e-5
            assert relative(ours(input_ids=ids).logits, expected) > 1e-2

    for _ in range(2):
        ours.train(), stock.train()
        ours(input_ids=ids, labels=ids).loss.backward()
        stock(input_ids=ids, labels=ids).loss.backward()
        reference = {
            name.replace(f".{ADAPTER}.", "."): p.grad for name, p in stock.named_parameters() if p.requires_grad
        }
        mine = {name.replace(f".{ADAPTER}.", "."): p.grad for name, p in adapter_parameters(ours)}
        assert mine.keys() == reference.keys()
        for name, gradient in mine.items():
            assert relative(gradient, reference[name]) < 1e-5, name
        for model in (ours, stock):
            model.zero_grad()
            model.eval()
            with torch.no_grad():
                model(input_ids=ids)
                with model.disable_adapter():
                    model(input_ids=ids)


def base_weights(path: Path) -> torch.nn.Module:
    return load_base(schema.Model(base=str(path), dtype="float32"), torch.device("cpu")).model


@pytest.mark.parametrize("family", DENSE)
def test_the_names_of_a_family_find_all_of_its_linear_layers(tmp_path: Path, family: str) -> None:
    path = write_model(tmp_path / "base", family)
    base = load_base(schema.Model(base=str(path), dtype="float32"), torch.device("cpu"))
    assert set(resolve_targets(schema.Adapter(), base, "tiny")) == set(linears(base.model))


@pytest.mark.parametrize(("family", "packs"), [("mistral", True), ("llama", True), ("falcon", False), ("bloom", False)])
def test_the_probe_knows_who_keeps_packed_examples_apart(tmp_path: Path, family: str, packs: bool) -> None:
    path = write_model(tmp_path / "base", family)
    assert load_base(schema.Model(base=str(path), dtype="float32"), torch.device("cpu")).packs is packs


def test_a_model_that_scales_its_logits_is_refused_and_its_plain_twin_is_not(tmp_path: Path) -> None:
    sizes = {"intermediate_size": 128, "num_key_value_heads": 2}
    plain = write_model(tmp_path / "plain", "granite", logits_scaling=1.0, **sizes)
    load_base(schema.Model(base=str(plain), dtype="float32"), torch.device("cpu"))
    scaled = write_model(tmp_path / "scaled", "granite", logits_scaling=8.0, **sizes)
    with pytest.raises(ModelError, match=r"granite.*scales or caps its logits"):
        load_base(schema.Model(base=str(scaled), dtype="float32"), torch.device("cpu"))


def test_the_bases_own_dropout_is_off(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mistral", attention_dropout=0.5)
    model = load_base(schema.Model(base=str(path), dtype="float32"), torch.device("cpu")).model.train()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("kind", "longest", "refused"), [("dynamic", 65, True), ("dynamic", 64, False), ("yarn", 65, False)]
)
def test_examples_that_would_change_others_through_their_positions_are_refused(
    tmp_path: Path, kind: str, longest: int, refused: bool
) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    path = write_model(tmp_path / "base", "llama", rope_parameters=rope, max_position_embeddings=64)
    config = read_config(str(path))
    if refused:
        with pytest.raises(ModelError, match=r"data\.max_length: 64"):
            check_length(config, "base", longest)
    else:
        check_length(config, "base", longest)


def test_a_base_is_told_from_another_by_its_weights(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base", "mistral")
    before = fingerprint_base(str(path))
    assert fingerprint_base(str(path)) == before
    write_model(path, "mistral", seed=1)
    assert fingerprint_base(str(path)) != before
