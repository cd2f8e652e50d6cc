"""Names of other frameworks lead to keys that exist."""

from __future__ import annotations

from typing import Literal, get_args, get_origin

import pytest

from tune.errors import RecipeError
from tune.recipe.elsewhere import KEYS, VALUES, look_up, look_up_value
from tune.recipe.load import load_recipe
from tune.recipe.problems import schema_keys

GOOD = {"model": {"base": "x"}, "data": {"train": "a"}}


def test_every_target_exists() -> None:
    known = schema_keys()
    for name, there in KEYS.items():
        assert name == name.lower().replace("-", "_")
        if there.key:
            assert there.key in known, name
            assert there.key.rpartition(".")[2] != name, f"{name} is our own name"
        else:
            assert len(there.note) > 20, name
        assert there.words.endswith("."), name
    assert len(KEYS) >= 200


def test_the_names_people_come_with() -> None:
    expected = {
        "lora_r": "adapter.rank",
        "load_in_4bit": "model.quantization",
        "sequence_len": "data.max_length",
        "cutoff_len": "data.max_length",
        "train_on_inputs": "data.train_on",
        "gradient_checkpointing": "train.recompute",
        "gradient_accumulation_steps": "train.batch_size",
        "per_device_train_batch_size": "train.batch_size",
        "save_total_limit": "train.keep",
        "router_aux_loss_coef": "router.balance_loss",
        "num_train_epochs": "train.epochs",
        "output_dir": "output",
        "report_to": "tracking.to",
        "hub_model_id": "push.repo",
    }
    assert {name: KEYS[name].key for name in expected} == expected
    assert KEYS["sample_packing"].words.startswith("Packing is always on")


def test_spelling_is_forgiven() -> None:
    assert look_up("Lora-R") == look_up("lora_r") == KEYS["lora_r"]
    assert look_up("nothing_of_the_kind") is None


def test_they_are_answered_at_any_level() -> None:
    recipe = {**GOOD, "lora_r": 8, "train": {"lora_alpha": 8}, "data": {"train": [{"path": "a", "max_samples": 5}]}}
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    text = str(caught.value)
    assert "recipe: lora_r: is not a key of a recipe. Here it is adapter.rank." in text
    assert "recipe: train.lora_alpha: is not a key of train. Here it is adapter.alpha." in text
    assert "recipe: data.train[0].max_samples: is not a key of data.train[0]. Here it is data.train.limit:" in text


def test_a_key_that_another_name_stands_for_is_not_also_missing() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe({"base_model": "x", "datasets": ["a"]})
    assert len(caught.value.problems) == 2


def test_values_belong_to_keys_that_have_choices() -> None:
    known = schema_keys()
    for key, hints in VALUES.items():
        annotation = known[key].annotation
        assert get_origin(annotation) is Literal, key
        assert not set(hints) & set(get_args(annotation)), key
    assert look_up_value("data.eval.format", "chat") == "Write messages."


def test_what_axolotl_and_llama_factory_say_of_turns_leads_to_the_data() -> None:
    for name in ("message_property_mappings", "tags"):
        assert KEYS[name].words.startswith("Turns have role and content (messages), or from and value (sharegpt)")
    assert "train, training or weight" in KEYS["message_field_training"].words
    assert "whole or not at all" in KEYS["message_field_training_detail"].words
    assert {KEYS[name].key for name in ("field", "shards", "mix_strategy")} == {
        "data.train.columns",
        "data.train.limit",
        "data.train.weight",
    }
    for name in ("roles", "shuffle", "drop_system_message", "train_on_eos", "train_on_eot", "eot_tokens"):
        assert KEYS[name].words.endswith("Remove it."), name
    assert KEYS["dataset_exact_deduplication"].words.startswith("`tune check` counts repeats")
    for ending in ("json", "csv", "parquet", "arrow"):
        assert look_up_value("data.train.format", ending).startswith("File types are recognised"), ending
