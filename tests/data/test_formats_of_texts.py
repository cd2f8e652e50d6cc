"""Texts that are learnt whole, and transcripts."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.data.test_formats import (
    detected,
    parse,
    shape,
)
from tune.data.conversation import BadRowError
from tune.data.encode import Encoder
from tune.data.formats import FORMATS, find_format
from tune.data.formats.text import WholeTexts
from tune.errors import DataError


def test_transcripts_are_read_as_conversations() -> None:
    text = "### Human: Say\nhi. ### Assistant: Hi.\n### Human: Bye ### Assistant: ### No heading: x"
    row = {"text": text}
    parsed = parse("text", row)
    assert shape(parsed) == [
        ("user", "Say\nhi."), ("assistant", "Hi."), ("user", "Bye"), ("assistant", "### No heading: x"),
    ]  # fmt: skip
    assert parsed.text is None
    assert all(m.trained for m in parsed.messages)
    assert detected(row) == "text (transcripts)"
    # Guanaco's own have no space before a mark.
    assert shape(parse("text", {"text": text.replace(" ### A", "### A").replace("\n###", "###")})) == shape(parsed)
    introduced = {"text": "A chat.\n\n### User: a\n\n### Assistant: b"}
    assert shape(parse("text", introduced)) == [("system", "A chat."), ("user", "a"), ("assistant", "b")]
    # The first rows decide for all of them, so that a text is not learnt in two ways unseen.
    fmt = find_format("text", [row, row, {"text": "plain"}])
    with pytest.raises(BadRowError, match="is no transcript like the other rows"):
        fmt.parse({"text": "plain"})
    with pytest.raises(BadRowError, match="turn 4, the answer, is empty"):
        fmt.parse({"text": "### Human: a ### Assistant: b ### Human: c ### Assistant:"})
    assert find_format("text", [row, {"text": "plain"}]).parse(row)[0].text == text
    assert detected({"text": "A page on #### Human: and ### Assistant: marks"}) == "text"


def test_a_transcript_with_its_answer_beside_it() -> None:
    row = {"input": "### Human: a ### Assistant: b ### Human: c ### Assistant:", "output": "d ### Human: e"}
    assert detected(row) == "alpaca (instruction: input, transcripts)"
    parsed = parse("alpaca", row)
    assert shape(parsed) == [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d ### Human: e")]
    assert [m.trained for m in parsed.messages] == [True, False, True, True]
    # What an instruction is about is no place to speak in.
    about = {"instruction": "### Human: a ### Assistant: b", "input": "x", "output": "y"}
    assert detected(about) == "alpaca"
    assert shape(parse("alpaca", about)) == [("user", about["instruction"]), ("assistant", "y")]
    unopened = {"prompt": "### Human: a", "completion": "b"}
    assert shape(parse("prompt_completion", unopened)) == [("user", "a"), ("assistant", "b")]
    with pytest.raises(BadRowError, match="the transcript in 'input' ends with an answer, and 'output' is another"):
        find_format("alpaca", [row]).parse({**row, "input": "### Human: a ### Assistant: b"})


@pytest.mark.parametrize("name", ["mistral_v1", "mistral_v3", "metaspace_v3", "chatml"])
def test_a_text_is_what_the_tokenizer_makes_of_it_and_its_end(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    texts = ["Once upon a time", " two  spaces\n\n", "x</s><s>[INST]<|im_end|>", "naïve 你好 🙂", "\n"]
    whole = WholeTexts(tokenizer)
    plain = copy.deepcopy(tokenizer.backend_tokenizer)
    plain.encode_special_tokens = True
    for text, encoded in zip(texts, Encoder(tokenizer).encode([whole.segments(text) for text in texts]), strict=True):
        assert not isinstance(encoded, BadRowError)
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token else []
        expected = [*begin, *plain.encode(text, add_special_tokens=False).ids, tokenizer.eos_token_id]
        assert list(encoded.ids) == expected
        assert bytes(encoded.trained) == b"\0" + b"\1" * (len(expected) - 1)


def test_a_text_takes_no_system_prompt_and_needs_an_end_token(mistral_v1: Any) -> None:
    (text,) = FORMATS["text"].parse({"text": "x"})
    assert text.with_system("s") == text.last_response_only() == text
    endless = copy.deepcopy(mistral_v1)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        WholeTexts(endless)
