"""Prompts equal FastChat's, or differ as their original authors do; llama-2 equals Meta's code to the token."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import LOOKALIKES, PIECES, dialogues, fixture_path
from tune.data.conversation import Conversation, Message
from tune.data.encode import Encoder, encode_prompt
from tune.data.templates import TEMPLATES
from tune.data.templates.resolve import resolve_template


def golden(name: str) -> tuple[Conversation, str]:
    case = json.loads(fixture_path("goldens/fastchat_prompts.json").read_text())[name]
    messages = []
    for question, answer in case["turns"]:
        messages.append(Message("user", question))
        if answer is not None:
            messages.append(Message("assistant", answer))
    return Conversation(tuple(messages)), case["prompt"]


def written(name: str, conversation: Conversation) -> str:
    segments = TEMPLATES[name].segments(conversation, generation_prompt=True)
    return "".join(segment.text for segment in segments)


# FastChat leaves the first begin-of-sequence token to the tokenizer.
@pytest.mark.parametrize("case", ["single", "multi"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("vicuna", "vicuna_v1.1"),
        ("koala", "koala_v1"),
        ("llama-2", "llama-2"),
        ("codellama", "llama-2"),
        ("zephyr", "zephyr"),
    ],
)
def test_prompts_equal_fastchats(name, theirs, case):
    conversation, prompt = golden(f"{theirs}/{case}")
    assert written(name, conversation) == f"<s>{prompt}"


@pytest.mark.parametrize("case", ["single", "multi"])
def test_mistral_v1_differs_by_spaces_that_mistral_common_does_not_write(case):
    # Text behind a control token gets its space from the tokenizer, so both are the same tokens (test_mistral_parity).
    conversation, prompt = golden(f"mistral/{case}")
    assert written("mistral-v1", conversation) == f"<s>{prompt}"
    assert written("mistral-v3", conversation) == f"<s>{prompt}".replace("[INST] ", "[INST]").replace(
        " [/INST] ", "[/INST]"
    ).replace(" [/INST]", "[/INST]")


@pytest.mark.parametrize("case", ["single", "multi"])
def test_alpaca_is_stanfords_where_fastchat_differs(case):
    conversation, prompt = golden(f"alpaca/{case}")
    stanford = prompt.replace("### Instruction: ", "### Instruction:\n").replace("### Response: ", "### Response:")
    assert written("alpaca", conversation) == f"<s>{stanford}"
    assert written("alpaca", conversation) != f"<s>{prompt}"


@pytest.mark.parametrize("case", ["single", "multi"])
def test_falcon_differs_by_the_end_of_answers_alone(case):
    conversation, prompt = golden(f"falcon/{case}")
    ours = written("falcon", conversation)
    assert ours.replace("</s>", "") == f"<s>{prompt}"
    assert ours.count("</s>") == sum(message.role == "assistant" for message in conversation.messages)


def test_falcon_makes_blank_lines_in_a_message_line_ends_as_its_authors_do():
    conversation = Conversation.of(
        ("system", " Be brief.\n"), ("user", " one\n\ntwo\r\n\r\nthree "), ("assistant", "a\r\nb\n\nc\n")
    )
    text = "".join(segment.text for segment in TEMPLATES["falcon"].segments(conversation))
    assert text == "<s>Be brief.\n\nUser: one\ntwo\nthree\n\nAssistant: a\nb\nc</s>"


def test_plain_is_not_zero_shot():
    conversation, prompt = golden("zero_shot/multi")
    assert written("plain", conversation) == "<s>Hello!\nHi!</s>How are you?\nI'm fine.</s>Bye\n"
    assert "### Human:" in prompt


def test_plain_ends_a_prompt_in_one_newline():
    conversation = Conversation.of(("system", "s"), ("user", "Q: 2 + 2?\nA: \n\n"), ("assistant", " 4"))
    text = "".join(segment.text for segment in TEMPLATES["plain"].segments(conversation))
    assert text == "<s>s\n\nQ: 2 + 2?\nA:\n 4</s>"


def test_zephyr_writes_a_system_message_under_its_heading():
    conversation = Conversation.of(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))
    segments = TEMPLATES["zephyr"].segments(conversation)
    text = "".join(segment.text for segment in segments)
    assert text == "<s><|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    assert "".join(segment.text for segment in segments if segment.trained) == "Hello</s>"


def test_zephyrs_headings_are_control_tokens_where_the_tokenizer_has_them(chatml):
    import copy

    from tune.data.templates.jinja_template import JinjaTemplate

    tokenizer = copy.deepcopy(chatml)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    template = resolve_template("zephyr", tokenizer)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    conversation = Conversation.of(("user", "a <|user|> b"), ("assistant", "<|assistant|>"))
    saved = JinjaTemplate("saved", template.jinja).bind(tokenizer)
    ours, theirs = Encoder(tokenizer).encode([template.segments(conversation), saved.segments(conversation)])
    assert ours == theirs
    assert ours.ids.tolist().count(user) == 1


@pytest.mark.parametrize("name", ["llama-2", "codellama"])
def test_llama_2_equals_metas_code_to_the_token(name, mistral_v1):
    """The reference encodes each pair of turns by itself with SentencePiece, between begin and end tokens."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(fixture_path("tokenizers/mistral-v1/tokenizer.model")))
    template = resolve_template(name, mistral_v1)
    encoder = Encoder(mistral_v1)

    def reference(conversation: Conversation) -> list[int]:
        turns = [message.text for message in conversation.messages]
        if conversation.has_system:
            system, first, *rest = turns
            turns = ["<<SYS>>\n" + system + "\n<</SYS>>\n\n" + first, *rest]
        ids = []
        for question, answer in zip(turns[::2], turns[1::2], strict=False):
            ids += [1, *model.encode("[INST] " + question.strip() + " [/INST] " + answer.strip() + " "), 2]
        if len(turns) % 2:
            ids += [1, *model.encode("[INST] " + turns[-1].strip() + " [/INST]")]
        return ids

    conversations = dialogues(300, pieces=(*PIECES, *LOOKALIKES), seed=13, inputs=True)
    for conversation, ours in zip(
        conversations, encoder.encode([template.segments(c) for c in conversations]), strict=True
    ):
        assert ours.ids.tolist() == reference(conversation)
    for conversation in conversations[:60]:
        asked = Conversation(conversation.messages[:-1])
        assert encode_prompt(asked.messages, template, mistral_v1) == reference(asked)
