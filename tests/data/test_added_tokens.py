"""Which tokens are added to a tokenizer, and that they stay what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tune.data.added_tokens import add_missing, describe, prepare_tokenizer
from tune.data.templates import TEMPLATES
from tune.data.templates.resolve import resolve_template
from tune.data.tokenizer import load_tokenizer, vocabulary_digest
from tune.errors import DataError

CHATML = ["<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base"), "mistral")


def recipe(folder: Path, base: Path, **changes: Any) -> Any:
    return tiny_recipe(folder, base=base, **{"data__template": "chatml", "data__add_tokens": True, **changes})


def test_what_a_template_needs_is_added_in_its_order_as_special_tokens(base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    before = tokenizer.get_vocab()
    with pytest.raises(DataError, match=r"lacks the control tokens <\|im_start\|>, <\|im_end\|>"):
        resolve_template("chatml", tokenizer)
    assert add_missing(TEMPLATES["chatml"], tokenizer) == CHATML
    assert resolve_template("chatml", tokenizer).name == "chatml"
    assert tokenizer.get_vocab() == before | {"<|im_start|>": 326, "<|im_end|>": 327}
    assert tokenizer.encode("a<|im_end|>b", add_special_tokens=False)[1] == 327
    assert tokenizer.decode([326, 327], skip_special_tokens=True) == ""
    assert tokenizer.eos_token == "</s>"
    assert add_missing(TEMPLATES["chatml"], tokenizer) == [], "a second time, nothing lacks"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_every_template_can_be_used_after_it(name: str, base: Path) -> None:
    tokenizer = load_tokenizer(str(base))
    add_missing(TEMPLATES[name], tokenizer)
    assert resolve_template(name, tokenizer).name == name


def test_the_tokenizer_is_the_same_after_it_was_saved(tmp_path: Path, base: Path) -> None:
    prepared = prepare_tokenizer(recipe(tmp_path, base))
    assert prepared.added == {"<|im_start|>": 326, "<|im_end|>": 327}
    assert prepared.ids == (326, 327)
    prepared.tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(str(tmp_path / "saved"))
    assert vocabulary_digest(again) == vocabulary_digest(prepared.tokenizer)
    assert vocabulary_digest(again) != vocabulary_digest(load_tokenizer(str(base)))


def test_only_where_the_recipe_says_so(tmp_path: Path, base: Path) -> None:
    assert prepare_tokenizer(recipe(tmp_path, base, data__add_tokens=False)).added == {}
    assert prepare_tokenizer(recipe(tmp_path, base, data__template="alpaca")).added == {}
    assert prepare_tokenizer(recipe(tmp_path, base, data__template="auto")).added == {}


@pytest.mark.parametrize("part", ["data__train", "data__eval"])
def test_a_sources_own_template_counts_too(tmp_path: Path, base: Path, part: str) -> None:
    sources = [{"path": str(tmp_path / "train.jsonl"), "template": "chatml"}]
    prepared = prepare_tokenizer(recipe(tmp_path, base, data__template="alpaca", **{part: sources}))
    assert list(prepared.added) == CHATML


def test_a_token_that_is_there_as_text_keeps_its_id_and_needs_no_row(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "mistral")
    content = json.loads((base / "tokenizer.json").read_text())
    content["model"]["vocab"]["<|im_end|>"] = 326
    (base / "tokenizer.json").write_text(json.dumps(content))
    prepared = prepare_tokenizer(recipe(tmp_path, base))
    assert prepared.added == {"<|im_start|>": 327}
    assert prepared.tokenizer.added_tokens_decoder[326].special
    assert prepared.tokenizer.encode("a<|im_end|>", add_special_tokens=False)[1:] == [326]


def test_what_is_said_of_it() -> None:
    assert describe({}) == "added tokens none: the tokenizer has all that the templates write"
    assert describe({"<a>": 5, "<b>": 6}) == "added tokens <a> 5, <b> 6"


def test_what_a_template_in_jinja_needs_is_not_known(tmp_path: Path, base: Path) -> None:
    path = str(tmp_path / "own.jinja")
    unknown = f"which control tokens template {path} writes is not known, so none is added for it"
    own = prepare_tokenizer(recipe(tmp_path, base, data__template=path)).added
    assert own == {}
    assert describe(own) == f"added tokens none: {unknown}"
    sources = [{"path": str(tmp_path / "train.jsonl"), "template": "chatml"}]
    both = prepare_tokenizer(recipe(tmp_path, base, data__template=path, data__train=sources)).added
    assert describe(both) == f"added tokens <|im_start|> 326, <|im_end|> 327; {unknown}"
    nothing = "added tokens none: the tokenizer has all that the templates write"
    assert describe(prepare_tokenizer(recipe(tmp_path, base, data__template="auto")).added) == nothing, "it is alpaca"


def test_what_the_tokenizers_own_template_needs_is_not_known(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "mistral")
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for name in ("tokenizer", "auto"):
        said = describe(prepare_tokenizer(recipe(tmp_path, base, data__template=name)).added)
        assert said.startswith(f"added tokens none: which control tokens template {name} writes is not known")
