"""A model run from its files is the model that transformers loads, and the 4-bit one is the one that trains."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.export.merges import DTYPES, FAMILIES, change_json, change_tensors, made, shard
from tests.tiny import VOCABULARY, write_model
from tune.errors import ModelError
from tune.kernels.nf4_linear import as_trained, dequantize
from tune.models.hub import read_config
from tune.models.load import load_base
from tune.models.shards import Checkpoint, checkpoint_in
from tune.models.streamed import StreamedModel, TrainedWeights, Weights
from tune.recipe import schema

CPU = torch.device("cpu")
PROMPTS = [np.random.default_rng(length).integers(0, VOCABULARY, length) for length in (17, 3, 1, 26)]


def streamed(folder: Path) -> tuple[StreamedModel, Checkpoint]:
    model, checkpoint = StreamedModel(read_config(str(folder)), str(folder)), checkpoint_in(folder)
    model.check(checkpoint)
    return model, checkpoint


@torch.no_grad()
def stock_logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.cat([model(input_ids=torch.from_numpy(prompt)[None]).logits[0] for prompt in PROMPTS])


def relative(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one.double() - two.double()).norm() / two.double().norm())


def streamed_logits(folder: Path) -> torch.Tensor:
    model, checkpoint = streamed(folder)
    weights = Weights(checkpoint)
    return model.head_logits(weights, model.last_hidden(weights, PROMPTS, CPU))


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, odd": ("llama", {"hidden_size": 60, "intermediate_size": 101, "head_dim": 14}),
    "llama, long positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ),
    "mistral with a window": ("mistral", {"sliding_window": 5}),
    "falcon, new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "qwen2": ("qwen2", {"intermediate_size": 128, "num_key_value_heads": 2}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_logits_are_those_of_the_stock_model(tmp_path: Path, variant: str) -> None:
    family, changes = VARIANTS[variant]
    folder = write_model(tmp_path / "base", family, **changes)
    expected = stock_logits(folder)
    assert expected.shape == (sum(map(len, PROMPTS)), VOCABULARY)
    assert relative(streamed_logits(folder), expected) < 1e-5
    change_tensors(folder / "model.safetensors", lambda tensors: [tensor.mul_(1.01) for tensor in tensors.values()])
    assert relative(streamed_logits(folder), expected) > 1e-3, "it is the files that are run"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_16_bits_is_run_in_float32(tmp_path: Path, dtype: str) -> None:
    folder = write_model(tmp_path / "base", "llama", getattr(torch, dtype))
    shard(folder)
    found = streamed_logits(folder)
    assert found.dtype == torch.float32
    assert relative(found, stock_logits(folder)) < 1e-5


def test_a_head_with_a_bias(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "phi", intermediate_size=128)

    def some(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.bias"].normal_(0, 1, generator=torch.Generator().manual_seed(1))

    change_tensors(folder / "model.safetensors", some)
    assert relative(streamed_logits(folder), stock_logits(folder)) < 1e-5


def test_running_leaves_no_weights_and_may_be_repeated(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "llama")
    model, checkpoint = streamed(folder)
    weights = Weights(checkpoint)
    first = model.last_hidden(weights, PROMPTS, CPU)
    assert all(parameter.is_meta for parameter in model.model.parameters())
    assert torch.equal(model.last_hidden(weights, PROMPTS, CPU), first)
    together = torch.cat([model.last_hidden(weights, [prompt], CPU) for prompt in PROMPTS])
    assert relative(first, together) < 1e-6, "padding is not seen"


def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """A module's parameters are there while it runs, and no other's; the embedding and the head are read by rows."""
    folder = write_model(tmp_path / "base", "llama")
    model, checkpoint = streamed(folder)
    held: list[list[str]] = []

    class Spy(Weights):
        def whole(self, name: str) -> torch.Tensor:
            held.append([key for key, parameter in model.model.named_parameters() if not parameter.is_meta])
            return super().whole(name)

    spy = Spy(checkpoint)
    model.head_logits(spy, model.last_hidden(spy, PROMPTS, CPU))
    assert len(held) == len(checkpoint.places) - 2, "all but the embedding and the head"
    assert held == [[]] * len(held)


def test_a_failure_on_the_way_leaves_the_model_usable(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "llama")
    model, checkpoint = streamed(folder)

    class Broken(Weights):
        def whole(self, name: str) -> torch.Tensor:
            if "layers.1" in name:
                raise ModelError("gone")
            return super().whole(name)

    with pytest.raises(ModelError):
        model.last_hidden(Broken(checkpoint), PROMPTS, CPU)
    weights = Weights(checkpoint)
    found = model.head_logits(weights, model.last_hidden(weights, PROMPTS, CPU))
    assert relative(found, stock_logits(folder)) < 1e-5


def test_the_vocabulary_is_computed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune.models.streamed._VOCABULARY_ROWS", 100)
    folder = write_model(tmp_path / "base", "bloom")
    assert relative(streamed_logits(folder), stock_logits(folder)) < 1e-5


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "llama")
    change_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.2\."):
        streamed(folder)
    change_json(folder / "config.json", num_hidden_layers=2, vocab_size=400)
    with pytest.raises(ModelError, match=r"has shape \[384, 64\], not \[400, 64\]"):
        streamed(folder)


def test_the_names_of_all_parameters_are_known(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "base", "llama")
    change_tensors(folder / "model.safetensors", lambda tensors: tensors.update(more=torch.zeros(3)))
    model, checkpoint = streamed(folder)
    assert model.check(checkpoint) == set(checkpoint.places) - {"more"}


# --- as trained ---


@pytest.mark.parametrize(("stored", "recipe"), list(itertools.product(DTYPES, ["float32", "bfloat16"])))
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_trained_weights_are_what_training_holds_to_the_bit(
    tmp_path: Path, family: str, stored: str, recipe: str
) -> None:
    folder = write_model(tmp_path / "base", family, getattr(torch, stored))
    dtype = getattr(torch, recipe)
    section = schema.Model(base=str(folder), dtype=recipe)
    model, checkpoint = streamed(folder)
    packed = {model.stored(checkpoint, name) for name in model.linears()}
    weights = TrainedWeights(checkpoint, packed, dtype)
    trained = load_base(section, CPU).model
    compared = 0
    for name, module in trained.named_modules():
        for parameter, value in module.named_parameters(recurse=False):
            found = weights.whole(model.stored(checkpoint, name, parameter))
            if isinstance(value, bnb.nn.Params4bit):
                value = dequantize(value, value.quant_state, dtype)
                compared += 1
            assert value.dtype == dtype
            assert torch.equal(found, value.float()), f"{name}.{parameter}"
    assert compared == len(packed) == (14 if family == "llama" else 8)
    table = model.stored(checkpoint, next(name for name, m in model.modules.items() if m is model.embedding))
    assert torch.equal(weights.rows(table, 5, 9), weights.whole(table)[5:9])


@pytest.mark.parametrize("shape", [(64, 64), (7, 33), (1, 5), (129, 65)])
def test_a_matrix_of_any_shape_is_packed_as_in_training(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    linear = bnb.nn.Linear4bit(shape[1], shape[0], False, compute_dtype=torch.float32, quant_type="nf4")
    linear.load_state_dict({"weight": weight})
    linear.to("cpu")
    before = weight.clone()
    found = as_trained(weight, torch.float32)
    assert torch.equal(found, dequantize(linear.weight, linear.weight.quant_state, torch.float32))
    assert torch.equal(weight, before)
    assert not torch.equal(found, weight)


def test_the_output_head_is_not_packed() -> None:
    run = made("llama", "float32")
    model, checkpoint = streamed(run.base)
    assert "lm_head" not in model.linears()
    assert len(model.linears()) == len(load_file(run.adapter_file)) // 2
    assert model.stored(checkpoint, "lm_head") == "lm_head.weight"
