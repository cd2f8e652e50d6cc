"""Loading tokenizers: the right text for every way in which a model's files can be there."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.data.conftest import PLAIN_PIECES, fixture_path
from tune.data.hub import explain
from tune.data.tokenizer import load_tokenizer
from tune.errors import DataError, ModelError


def copied(tmp_path, name: str, files: tuple[str, ...], **config) -> str:
    source = fixture_path(name)
    for file in files:
        shutil.copy(source / file, tmp_path)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
    return str(tmp_path)


def sentencepiece_of(name: str):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(fixture_path(name) / "tokenizer.model"))


TEXTS = [*PLAIN_PIECES[:7], "Hi  Hello", "  lead  ", "\n\n  x", "a\tb", "x = {  'k': 1 }\n\n\n", "ﬁ ＡＢ", "🙂 你好  "]


BOTH = ("tokenizer.json", "tokenizer.model")
SMALL, V1, V3 = "models/stories260K-mistral", "tokenizers/mistral-v1", "tokenizers/mistral-v3"


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    ("name", "files"),
    [(SMALL, BOTH), (SMALL, BOTH[:1]), (SMALL, BOTH[1:]), (V1, BOTH), (V1, BOTH[:1]), (V3, BOTH[:1])],
)
def test_every_way_of_shipping_a_tokenizer_reads_as_sentencepiece_does(tmp_path, name, files, kind):
    check_against_sentencepiece(tmp_path, name, files, kind)


@pytest.mark.parametrize("name", [V1, V3])
def test_a_bare_sentencepiece_model_is_converted(tmp_path, name):
    check_against_sentencepiece(tmp_path, name, BOTH[1:], "LlamaTokenizer")


def check_against_sentencepiece(tmp_path, name, files, kind):
    tokenizer = load_tokenizer(copied(tmp_path, name, files, tokenizer_class=kind))
    truth = sentencepiece_of(name)
    assert tokenizer.is_fast
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == truth.encode(text), text
    assert tokenizer.eos_token_id == truth.eos_id()
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id == truth.bos_id()
    assert tokenizer.decode(tokenizer.encode("Hi  there", add_special_tokens=False)) == "Hi  there"


def test_files_that_disagree_are_refused(tmp_path):
    folder = copied(tmp_path, "tokenizers/mistral-v1", ("tokenizer.json", "tokenizer.model"))
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    state["model"]["merges"] = state["model"]["merges"][:2000]
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"reads 'Hello' differently from its own tokenizer\.model"):
        load_tokenizer(folder)


def test_what_is_missing_is_said(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(ModelError, match=r"model: has no tokenizer \(neither tokenizer\.json nor tokenizer\.model\)"):
        load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(ModelError, match=r"there is no such folder\. Did you mean 'model'\?"):
        load_tokenizer(str(tmp_path / "modle"))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="model: its tokenizer cannot be read"):
        load_tokenizer(str(tmp_path / "model"))
    with pytest.raises(ModelError, match="is a file"):
        load_tokenizer(str(tmp_path / "model" / "tokenizer.json"))


def test_an_unknown_model_is_said_without_a_network(monkeypatch):
    with pytest.raises(ModelError, match="neither here nor in the cache, and the Hub cannot be reached"):
        load_tokenizer("nobody/nothing-of-this-name")


def test_a_gated_model_names_the_page_to_accept():
    class GatedRepoError(Exception):
        pass

    said = explain(GatedRepoError("403 Client Error"), "o/n", "model.base")
    assert said is not None
    assert "Accept its terms at https://huggingface.co/o/n" in said
    assert "HF_TOKEN" in said
