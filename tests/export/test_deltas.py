"""What an adapter adds, as stock PEFT computes it, and what of an adapter a merge refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.export.merges import Made, change_json, change_tensors, made
from tune.errors import ModelError
from tune.export.deltas import Pair, read_pairs
from tune.export.merge import merge

FIRST = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.fixture
def run(tmp_path: Path) -> Made:
    """A run to spoil."""
    return made().copy(tmp_path / "made")


class Net(nn.Module):
    """Two linear layers of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(7, 13), nn.Linear(13, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 4, "lora_alpha": 16, "use_rslora": True},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"two": 2}},
        {"r": 4, "lora_alpha": 6, "rank_pattern": {"two": 9}, "use_rslora": True},
    ],
)
def test_a_delta_is_what_stock_peft_adds(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = get_peft_model(Net(), LoraConfig(target_modules=["one", "two"], init_lora_weights=False, **settings))
    model.save_pretrained(tmp_path)
    pairs = read_pairs(tmp_path)
    assert set(pairs) == {"one.weight", "two.weight"}
    for name, pair in pairs.items():
        layer = getattr(model.base_model.model, name.removesuffix(".weight"))
        expected = layer.get_delta_weight("default")
        delta = pair.delta(tuple(layer.weight.shape))
        assert delta is not None
        assert pair.delta((99, *layer.weight.shape[1:])) is None
        assert torch.allclose(delta.rows(0, 100), expected, atol=1e-6)
        assert torch.allclose(delta.rows(2, 4), expected[2:4], atol=1e-6)


def test_a_delta_of_a_16_bit_adapter_is_computed_in_float32(tmp_path: Path) -> None:
    a_RI, b_OR = torch.randn(4, 33).bfloat16(), torch.randn(9, 4).bfloat16()
    save_file(
        {"base_model.model.x.lora_A.weight": a_RI, "base_model.model.x.lora_B.weight": b_OR},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4}))
    pair = read_pairs(tmp_path)["x.weight"]
    assert isinstance(pair, Pair)
    delta = pair.delta((pair.b.shape[0], pair.a.shape[1]))
    assert delta is not None
    found = delta.rows(0, 9)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), b_OR.double() @ a_RI.double(), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [3]}, "no rows for the 1 tokens that trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"peft_type": None}, "merges LoRA"),
        ({"lora_alpha": None}, "merges LoRA"),
        ({"r": 9}, "stock PEFT expects"),
        ({"rank_pattern": {"q_proj": 2}}, "stock PEFT expects"),
        ({"target_modules": ["q_proj"]}, "stock PEFT has no place"),
    ],
)
def test_what_a_merge_would_lose_is_refused_by_name(
    run: Made, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    change_json(run.run.adapter / "adapter_config.json", **changes)
    refused(run, tmp_path, words)


def refused(run: Made, tmp_path: Path, words: str) -> None:
    with pytest.raises(ModelError) as error:
        merge(run.run.root, tmp_path / "out")
    assert words in str(error.value)
    assert len(error.value.problems) == 1
    assert str(run.run.adapter) in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"made"}, "nothing is left behind"


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_B.weight"][1, 1] = torch.nan


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_A.weight"][0, 0] = torch.inf


def without_b(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{FIRST}.lora_B.weight"]


def without_a(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{FIRST}.lora_A.weight"]


def without_both(tensors: dict[str, Tensor]) -> None:
    without_a(tensors)
    without_b(tensors)


def of_two_ranks(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_A.weight"] = torch.zeros(5, 128)


def of_no_rank(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_A.weight"] = torch.zeros(0, 128)
    tensors[f"{FIRST}.lora_B.weight"] = torch.zeros(64, 0)


def with_magnitudes(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_magnitude_vector"] = torch.ones(64)


def with_a_whole_module(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(4, 4)


def on_embeddings(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(4, 4)


def of_another_layer(tensors: dict[str, Tensor]) -> None:
    for which in "AB":
        old = f"{FIRST}.lora_{which}.weight"
        tensors[old.replace("layers.0", "layers.7")] = tensors.pop(old)


def three_dimensional(tensors: dict[str, Tensor]) -> None:
    tensors[f"{FIRST}.lora_A.weight"] = torch.zeros(4, 128, 1)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (nan, "holds NaN or infinity"),
        (infinite, "holds NaN or infinity"),
        (without_b, "has no"),
        (without_a, "lora_B"),
        (without_both, "stock PEFT expects"),
        (of_two_ranks, "do not fit together"),
        (of_no_rank, "do not fit together"),
        (three_dimensional, "do not fit together"),
        (with_magnitudes, "lora_magnitude_vector"),
        (with_a_whole_module, "lm_head.weight"),
        (on_embeddings, "lora_embedding_A"),
        (of_another_layer, "model.layers.7.mlp.down_proj"),
        (dict.clear, "holds no LoRA"),
    ],
)
def test_a_spoiled_adapter_is_refused_by_name(
    run: Made, tmp_path: Path, spoil: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    change_tensors(run.adapter_file, spoil)
    refused(run, tmp_path, words)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("how", ["gone", "empty", "half", "a list"])
def test_a_broken_file_of_the_adapter_is_told(run: Made, tmp_path: Path, name: str, how: str) -> None:
    path = run.run.adapter / name
    content = {"empty": b"", "half": path.read_bytes()[: path.stat().st_size // 2], "a list": b"[1, 2]"}
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[how])
    refused(run, tmp_path, "adapter")


def test_an_adapter_keeps_its_names(run: Made) -> None:
    names = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in load_file(run.adapter_file)}
    assert set(read_pairs(run.run.adapter)) == {f"{name}.weight" for name in names}


def test_a_key_of_a_newer_peft_is_refused_by_its_name(tmp_path: Path) -> None:
    run = made().copy(tmp_path / "made").run
    change_json(run.adapter / "adapter_config.json", use_qalora=True, use_something_new=3, harmless_and_off=False)
    with pytest.raises(ModelError, match=r"use_qalora, use_something_new\. peft's"):
        read_pairs(run.adapter)
