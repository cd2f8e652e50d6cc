"""Tokenizers made to do harm: each ends in one message, or is read as any other, and never reaches another file."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.security.limited import assert_one_message, limited
from tests.tiny import write_tokenizer
from tune.data.encode import Encoder
from tune.data.templates.segment import Segment
from tune.data.tokenizer import load_tokenizer

Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_tokenizer(folder)
    load_tokenizer(str(folder))  # what is imported here, no child need import
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "base"))


def state(*path: str, to: object) -> Spoil:
    """Put something into tokenizer.json."""

    def spoil(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return spoil


def added(number: object, content: object = "<x>") -> Spoil:
    """Add a token to tokenizer.json."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)

    def spoil(folder: Path) -> None:
        content_ = json.loads((folder / "tokenizer.json").read_text())
        content_["added_tokens"].append({"id": number, "content": content, "special": True, **flags})
        (folder / "tokenizer.json").write_text(json.dumps(content_))

    return spoil


def config(**changes: object) -> Spoil:
    """Put something into tokenizer_config.json."""

    def spoil(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def written(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def sparse(name: str, size: int) -> Spoil:
    def spoil(folder: Path) -> None:
        with (folder / name).open("ab") as file:
            file.truncate(size)

    return spoil


def pipe(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


def device(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return spoil


def replaced(pattern: dict[str, str], content: str, times: int = 1) -> Spoil:
    one = {"type": "Replace", "pattern": pattern, "content": content}
    return state("normalizer", to={"type": "Sequence", "normalizers": [one] * times})


def split(pattern: str) -> Spoil:
    found = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return state("pre_tokenizer", to=found)


DEEP = b"[" * 200_000

REFUSED: dict[str, tuple[Spoil, str]] = {
    "nested lists": (written("tokenizer.json", DEEP), "nested too deeply"),
    "nested objects": (written("tokenizer.json", b'{"model":' * 100_000), "nested too deeply"),
    "a list": (written("tokenizer.json", b"[]"), "no JSON object"),
    "nothing": (written("tokenizer.json", b""), "cannot be read"),
    "not text": (written("tokenizer.json", b'{"a": "\xff"}'), "cannot be read"),
    "digits": (written("tokenizer.json", b'{"a": ' + b"9" * 10**6 + b"}"), "cannot be read"),
    "ten gigabytes": (sparse("tokenizer.json", 10 << 30), "10,240 MiB"),
    "ten gigabytes of SentencePiece": (sparse("tokenizer.model", 10 << 30), "10,240 MiB"),
    "ten gigabytes of template": (sparse("chat_template.jinja", 10 << 30), "10,240 MiB"),
    "a pipe": (pipe("tokenizer.json"), "no tokenizer"),
    "a config that is a pipe": (pipe("tokenizer_config.json"), "no plain file"),
    "a template that is a pipe": (pipe("chat_template.jinja"), "no plain file"),
    "a map that is a device": (device("special_tokens_map.json"), "no plain file"),
    "negative id": (state("model", "vocab", "zz", to=-5), "'zz' the id -5"),
    "id that makes a long list": (state("model", "vocab", "zz", to=10**9), "'zz' the id 1000000000"),
    "id at the end of 32 bits": (state("model", "vocab", "zz", to=2**32 - 1), "'zz' the id 4294967295"),
    "id beyond 64 bits": (state("model", "vocab", "zz", to=2**80), "'zz' the id"),
    "id that is a text": (state("model", "vocab", "zz", to="7"), "'zz' the id 7"),
    "added id far away": (added(10**9), "'<x>' the id 1000000000"),
    "added id beyond 32 bits": (added(10**12), "'<x>' the id 1000000000000"),
    "added id negative": (added(-1), "'<x>' the id -1"),
    "added nothing": (added(384, ""), "is no token"),
    "added a book": (added(384, "x" * 10**6), "is no token"),
    "added a number": (added(384, 5), "is no token"),
    "added tokens a text": (state("added_tokens", to="abc"), "added_tokens is no list"),
    "normaliser of gigabytes": (replaced({"String": "e"}, "e" * 1000, 4), "more than 64 characters"),
    "normaliser that doubles": (replaced({"String": "e"}, "ee", 20), "more than 64 characters"),
    "normaliser between letters": (replaced({"Regex": ""}, "x" * 100), "more than 64 characters"),
    "prepended book": (state("normalizer", to={"type": "Prepend", "prepend": "a" * 10**6}), "more than 64"),
    "table cut": (state("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "charsmap"),
    "table larger than itself": (
        state("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "/////w=="}),
        "charsmap",
    ),
    "table that points out of itself": (
        state("normalizer", to={"type": "Precompiled", "precompiled_charsmap": "BAAAAP////8="}),
        "index out of bounds",
    ),
    "pattern of a megabyte": (split("a" * 10**6), "pattern of 1000000 characters"),
    "pattern that is none": (split("("), "cannot be read"),
    "merge of unknown tokens": (state("model", "merges", to=[["zz", "yy"]]), "cannot be read"),
    "model of nothing": (state("model", to={"type": "Unigram", "vocab": [], "unk_id": 5}), "cannot be read"),
    "model without its unknown": (state("model", to={"type": "WordPiece", "vocab": {"a": 0}}), "tokenizer"),
    "config nested": (written("tokenizer_config.json", DEEP), "nested too deeply"),
    "config a list": (written("tokenizer_config.json", b"[1]"), "no JSON object"),
    "config in UTF-16": (written("tokenizer_config.json", '{"a": 1}'.encode("utf-16")), "tokenizer_config.json"),
    "map nested": (written("special_tokens_map.json", DEEP), "tokenizer"),
    "length a word": (config(model_max_length="big"), "model_max_length is big"),
    "length negative": (config(model_max_length=-1), "model_max_length is -1"),
    "length infinite": (config(model_max_length=float("inf")), "model_max_length is inf"),
    "length true": (config(model_max_length=True), "model_max_length is True"),
    "template a number": (config(chat_template=5), "chat_template is no text"),
    "template a list": (config(chat_template=["a"]), "chat_template is no text"),
    "template of lists": (config(chat_template={"default": {"b": 1}}), "chat_template is no text"),
    "template named, a number": (config(chat_template=[{"name": "default", "template": 5}]), "no text"),
    "token a number": (config(eos_token=5), "eos_token is 5"),
    "token a list": (config(eos_token=["a"]), "eos_token is a list"),
    "token of a number": (config(eos_token={"__type": "AddedToken", "content": 5}), "cannot be"),
    "class of another library": (config(tokenizer_class="os.system"), "'os.system' as tokenizer_class"),
    "class of a model": (config(tokenizer_class="AutoModelForCausalLM"), "'AutoModelForCausalLM'"),
    "class a list": (config(tokenizer_class=["a"]), "tokenizer_class"),
    "arguments": (config(self=1), "tokenizer"),
    "vocabulary elsewhere": (config(vocab_file="/etc/passwd"), "vocab_file names a file outside"),
    "merges elsewhere": (config(merges_file="../../../../../../../../etc/passwd"), "merges_file names a file"),
    "weights elsewhere": (config(gguf_file="/etc/passwd"), "gguf_file names a file outside"),
    "files elsewhere": (config(fast_tokenizer_files=["/etc/passwd"]), "fast_tokenizer_files names a file"),
    "folder elsewhere": (config(subfolder="../.."), "subfolder names a file outside"),
}

READ: dict[str, Spoil] = {
    "two tokens of one id": state("model", "vocab", "zz", to=5),
    "padding to gigabytes": state(
        "padding",
        to={
            "strategy": {"Fixed": 10**10},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<s>",
        },
    ),
    "a length of 31 digits": config(model_max_length=10**30),
    "a token's path": config(extra_special_tokens={"image_token": "/etc/passwd"}),
    "where it once was": config(
        name_or_path="/etc", tokenizer_file="/etc/passwd", special_tokens_map_file="/etc/passwd"
    ),
    "a decoder's id": config(added_tokens_decoder={"1000000000000": {"content": "<q>", "special": True}}),
    "code that nobody trusts": config(auto_map={"AutoTokenizer": ["x.Y", "x.Y"]}, trust_remote_code=True),
    "a broken SentencePiece model beside": written("tokenizer.model", b"garbage" * 100),
}


def read(folder: Path) -> int:
    """Load it, as every verb does, and read a text; return the largest id there is."""
    tokenizer = load_tokenizer(str(folder))
    [encoded] = Encoder(tokenizer).encode([[Segment("hello aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa b")]])
    assert not isinstance(encoded, Exception)
    return max(max(encoded.ids), *tokenizer.get_vocab().values())


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, folder: Path) -> None:
    spoil, words = REFUSED[name]
    spoil(folder)
    assert_one_message(limited(lambda: read(folder)), words, "base")


@pytest.mark.parametrize("name", READ)
def test_read_as_any_other(name: str, folder: Path) -> None:
    READ[name](folder)
    ended = limited(lambda: read(folder))
    assert ended.code == 0, ended
    assert int(ended.said) < 1000
    assert ended.opened == ()
    assert ended.grown < 300 << 20


def test_a_pattern_that_gives_up_on_a_text_is_told(folder: Path) -> None:
    """Oniguruma counts its own retries; Rust makes a panic of that, which is no Exception."""
    split("(a+)+$")(folder)
    assert_one_message(limited(lambda: read(folder)), "retry-limit", "model.base")


def test_a_model_far_larger_than_its_tokens_is_not_made_by_the_files_of_a_good_one(good: Path) -> None:
    """The bounds leave room: real vocabularies have gaps, and added tokens stand behind them."""
    from tune.data.tokenizer_files import _check_state

    content: dict[str, Any] = json.loads((good / "tokenizer.json").read_text())
    assert not list(_check_state(content, good))
    gap = copy.deepcopy(content)
    gap["added_tokens"].append({"id": 60_000, "content": "<x>"})
    gap["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁▁▁"}
    assert not list(_check_state(gap, good))


def test_no_id_reaches_an_embedding_that_has_no_row_for_it(work: Path, monkeypatch, capfd) -> None:
    """On a GPU it would be an assertion far from its cause, so it is said before the first step, and by `check`."""
    from tune.cli.main import _run

    monkeypatch.chdir(work)
    path = work / "base/tokenizer.json"
    content = json.loads(path.read_text())
    letter = next(token for token in content["model"]["vocab"] if token == "e")
    content["model"]["vocab"][letter] = 5000
    path.write_text(json.dumps(content))
    shutil.rmtree(work / "run")
    assert _run(["train", "recipe.yaml", "--quiet"]) == 2
    said = capfd.readouterr().err
    assert "gives token 5000" in said
    assert "384 embeddings" in said


@pytest.mark.parametrize("name", ["id that makes a long list", "class of a model", "vocabulary elsewhere"])
def test_the_verbs_say_so(name: str, work: Path, monkeypatch, capfd) -> None:
    from tune.cli.main import _run

    monkeypatch.chdir(work)
    spoil, words = REFUSED[name]
    spoil(work / "base")
    for verb in ("check", "preview"):
        assert _run([verb, "recipe.yaml", "--quiet"]) == 2
        said = capfd.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
    spoil(work / "run/adapter")
    for command in (["generate", "run", "hi"], ["merge", "run", "--output", "elsewhere"]):
        assert _run([*command, "--quiet"]) == 2
        said = capfd.readouterr().err
        assert words in said
        assert len(said.splitlines()) == 1
