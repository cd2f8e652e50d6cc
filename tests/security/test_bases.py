"""Bases made to do harm by their config.json or the headers of their weights: refused before anything is allocated."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.security.limited import assert_one_message, limited
from tests.tiny import write_model
from tune.errors import ModelError
from tune.models.load import load_base, outline_base
from tune.models.sizes import check_numbers
from tune.recipe import schema

Spoil = Callable[[Path], object]
MIXTURE = {"model_type": "mixtral"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {family: write_model(tmp_path_factory.mktemp(family) / "base", family) for family in ("mistral", "mixtral")}
    for folder in made.values():  # what is imported here, no child need import
        load_base(section(folder), torch.device("cpu"))
    return made


def section(folder: Path, **changes: Any) -> schema.Model:
    return schema.Model(base=str(folder), dtype="float32", **changes)


def config(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def written(content: bytes) -> Spoil:
    return lambda folder: (folder / "config.json").write_bytes(content)


def header(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Write the weights' header anew."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        found = json.loads(content[8 : 8 + length])
        change(found)
        text = json.dumps(found).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return spoil


HEAD = "lm_head.weight"


def tensor(name: str = HEAD, **changes: object) -> Spoil:
    return header(lambda found: found[name].update(changes))


def length(claimed: int) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(claimed.to_bytes(8, "little") + path.read_bytes()[8:])

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return spoil


SIZES: dict[str, tuple[Spoil, str]] = {
    "layers": (config(num_hidden_layers=10**9), "num_hidden_layers 1000000000"),
    "layers that the weights lack": (config(num_hidden_layers=4000), "from model.layers.2 on"),
    "layers below zero": (config(num_hidden_layers=-1), "num_hidden_layers -1"),
    "hidden size": (config(hidden_size=10**9), "hidden_size 1000000000"),
    "hidden size that the weights lack": (config(hidden_size=65536, num_attention_heads=64), "wrong shape"),
    "intermediate size that the weights lack": (config(intermediate_size=10**6), "wrong shape"),
    "vocabulary": (config(vocab_size=10**12), "vocab_size 1000000000000"),
    "vocabulary that the weights lack": (config(vocab_size=10**7), "wrong shape"),
    "heads": (config(num_attention_heads=10**8), "num_attention_heads 100000000"),
    "heads that the weights lack": (config(num_attention_heads=60_000, num_key_value_heads=60_000), "wrong shape"),
    "no heads": (config(num_attention_heads=0), "config.json"),
    "head's size": (config(head_dim=10**8), "head_dim 100000000"),
    "odd head's size": (config(head_dim=7), "base"),
    "not a number": (config(rms_norm_eps=float("nan")), "rms_norm_eps nan"),
    "infinite": (config(rope_theta=float("inf")), "rope_theta inf"),
    "labels": (config(num_labels=10**9), "num_labels 1000000000"),
    "a word": (config(hidden_size="big"), "hidden_size"),
    "a list": (config(num_hidden_layers=[2]), "config.json"),
    "true": (config(num_attention_heads={"a": 1}), "config.json"),
    "share that turns": (config(partial_rotary_factor=10**9), "partial_rotary_factor 1000000000"),
    "share that turns, inside": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 10**9}),
        "partial_rotary_factor",
    ),
    "positions by an unknown rule": (config(rope_scaling={"rope_type": "os.system", "factor": 2.0}), "config.json"),
    "padding token": (config(pad_token_id=10**9), "config.json"),
    "dtype": (config(torch_dtype="os.system", dtype="os.system"), "base"),
    "class of a tokenizer": (config(tokenizer_class="AutoModelForCausalLM"), "'AutoModelForCausalLM'"),
    "kind": (config(model_type="../../etc/passwd"), "model_type"),
    "kind a number": (config(model_type=7), "model_type"),
    "activation": (config(hidden_act="os.system"), "config.json"),
    "nested": (written(b"[" * 10**6), "cannot be read"),
    "digits": (written(b'{"model_type": "mistral", "hidden_size": ' + b"9" * 10**6 + b"}"), "cannot be read"),
    "twenty megabytes": (written(b'{"a": "' + b"x" * (20 << 20) + b'"}'), "longer than the 16 MiB"),
    "a pipe": (pipe("config.json"), "config.json"),
}

EXPERTS: dict[str, tuple[Spoil, str]] = {
    "experts": (config(num_local_experts=10**6), "num_local_experts 1000000"),
    "experts that the weights lack": (config(num_local_experts=60_000), "wrong shape"),
    "no experts": (config(num_local_experts=0), "base"),
    "experts of a token": (config(num_experts_per_tok=50), "base"),
}

HEADERS: dict[str, tuple[Spoil, str]] = {
    "length of exabytes": (length(2**63), "model.safetensors"),
    "length of gigabytes": (length(2**32), "model.safetensors"),
    "no length": (length(0), "model.safetensors"),
    "shape of petabytes": (tensor(shape=[10**9, 10**6]), HEAD),
    "negative shape": (tensor(shape=[-384, -64]), "model.safetensors"),
    "shape of words": (tensor(shape=["a"]), "model.safetensors"),
    "places that overlap": (tensor("model.norm.weight", data_offsets=[0, 256]), "model.safetensors"),
    "places beyond the end": (tensor(data_offsets=[10**12, 10**12 + 384 * 64 * 4]), "model.safetensors"),
    "places turned round": (tensor(data_offsets=[384 * 64 * 4, 0]), "model.safetensors"),
    "unknown type": (tensor(dtype="os.system"), "model.safetensors"),
    "whole numbers": (tensor(dtype="I32"), HEAD),
    "a name for two": (header(lambda found: found.update({HEAD: found["model.norm.weight"]})), "model.safetensors"),
}


def refused(folder: Path, spoil: Spoil, words: str, **changes: Any) -> None:
    """Whatever asks for the base, its outline or its weights, gets one message."""
    spoil(folder)
    for ask in (outline_base, lambda which: load_base(which, torch.device("cpu"))):
        started = time.monotonic()
        ended = limited(lambda ask=ask: ask(section(folder, **changes)) and None)
        if ended.code == 0 and ask is outline_base:
            continue  # it does not need what is wrong
        assert_one_message(ended, words, "base")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("name", SIZES)
def test_a_config_is_refused(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    spoil, words = SIZES[name]
    refused(Path(shutil.copytree(good["mistral"], tmp_path / "base")), spoil, words)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_mixtures_config_is_refused(name: str, quantization: str, good: dict[str, Path], tmp_path: Path) -> None:
    spoil, words = EXPERTS[name]
    refused(Path(shutil.copytree(good["mixtral"], tmp_path / "base")), spoil, words, quantization=quantization)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_refused(name: str, good: dict[str, Path], tmp_path: Path) -> None:
    spoil, words = HEADERS[name]
    refused(Path(shutil.copytree(good["mistral"], tmp_path / "base")), spoil, words)


KNOWN = [
    {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "sliding_window": 4096, "rope_theta": 1e4},
    {"num_hidden_layers": 126, "hidden_size": 16384, "intermediate_size": 53248, "max_position_embeddings": 131072},
    {"num_experts": 512, "moe_intermediate_size": 512, "router_aux_loss_coef": 0.001, "max_window_layers": 70},
    {"vocab_size": 262208, "head_dim": 256, "final_logit_softcapping": 30.0, "layer_types": ["full_attention"]},
    {"rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}},
    {"pad_token_id": -1, "partial_rotary_factor": 0.5, "time_step_limit": [0.0, float("inf")], "n_positions": 2048},
]
"""Numbers as good configs have them."""


@pytest.mark.parametrize("content", KNOWN)
def test_the_numbers_of_good_configs_pass(content: dict[str, Any]) -> None:
    check_numbers("base", content)


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_local_experts", "head_dim", "hidden_size"])
def test_a_number_is_found_at_any_depth(key: str) -> None:
    with pytest.raises(ModelError, match=f"{key} 1000000000"):
        check_numbers("base", {"text_config": [{"inner": {key: [10**9]}}]})


@pytest.mark.parametrize("name", ["layers", "vocabulary that the weights lack", "experts of nothing", "nested"])
def test_the_verbs_say_so(name: str, work: Path, monkeypatch, capfd) -> None:
    from tune.cli.main import _run

    monkeypatch.chdir(work)
    spoil, words = SIZES.get(name, (config(num_local_experts=10**9), "num_local_experts"))
    spoil(work / "base")
    shutil.rmtree(work / "run/merged")
    for command in (["check", "recipe.yaml"], ["train", "recipe.yaml", "output=new"], ["generate", "run", "hi"]):
        assert _run([*command, "--quiet"]) == 2, command
        said = capfd.readouterr().err
        assert words in said, command
        assert len(said.splitlines()) == 1, command
    assert not (work / "new/adapter").exists()
