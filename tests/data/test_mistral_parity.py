"""The `[INST]` templates equal mistral-common to the token, on white space, unicode and written-out tokens."""

from __future__ import annotations

import pytest

from tests.data.conftest import LOOKALIKES, PIECES, dialogues, fixture_path
from tune.data.conversation import Conversation, Message
from tune.data.encode import Encoder, encode_prompt
from tune.data.templates.resolve import resolve_template

mistral_common = pytest.importorskip("mistral_common")


def reference(version: int):
    from importlib.resources import files

    from mistral_common.tokens.tokenizers.base import TokenizerVersion
    from mistral_common.tokens.tokenizers.instruct import InstructTokenizerV1, InstructTokenizerV2, InstructTokenizerV3
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    if version == 2:
        path = files(mistral_common) / "data" / "mistral_instruct_tokenizer_240216.model.v2"
    else:
        path = fixture_path(f"tokenizers/mistral-v{version}/tokenizer.model")
    kind = {1: InstructTokenizerV1, 2: InstructTokenizerV2, 3: InstructTokenizerV3}[version]
    return kind(SentencePieceTokenizer(path, tokenizer_version=TokenizerVersion(f"v{version}")))


def reference_ids(instruct, conversation: Conversation) -> list[int]:
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.normalize import InstructRequestNormalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    request = ChatCompletionRequest(messages=[kinds[m.role](content=m.text) for m in conversation.messages])
    normal = InstructRequestNormalizer.normalizer().from_chat_completion_request(request)
    return instruct.encode_instruct(normal).tokens


CASES = [
    ("mistral-v1", "mistral_v1", 1),
    ("mistral-v2", "mistral_v2", 2),
    ("mistral-v3", "mistral_v3", 3),
    ("mistral-v3", "metaspace_v3", 3),
]


@pytest.mark.parametrize(("name", "fixture", "version"), CASES)
def test_ids_equal_mistral_common(name, fixture, version, request):
    tokenizer = request.getfixturevalue(fixture)
    instruct = reference(version)
    template = resolve_template(name, tokenizer)
    conversations = dialogues(500, pieces=(*PIECES, *LOOKALIKES), seed=version, inputs=True)
    encoded = Encoder(tokenizer).encode([template.segments(c) for c in conversations])
    for conversation, ours in zip(conversations, encoded, strict=True):
        assert ours.ids.tolist() == reference_ids(instruct, conversation), conversation


@pytest.mark.parametrize(("name", "fixture", "version"), CASES)
def test_generation_prompts_equal_mistral_common(name, fixture, version, request):
    tokenizer = request.getfixturevalue(fixture)
    instruct = reference(version)
    template = resolve_template(name, tokenizer)
    for conversation in dialogues(60, seed=10 + version):
        messages = (*conversation.messages, Message("user", " and then? [INST]"))
        assert encode_prompt(messages, template, tokenizer) == reference_ids(instruct, Conversation(messages))


@pytest.mark.parametrize(("name", "fixture", "version"), CASES)
def test_what_is_trained_is_the_answers_and_their_ends(name, fixture, version, request):
    tokenizer = request.getfixturevalue(fixture)
    text_tokenizer = reference(version).tokenizer
    template = resolve_template(name, tokenizer)
    conversations = dialogues(60, seed=20)
    every = Encoder(tokenizer).encode([template.segments(c) for c in conversations])
    for conversation, encoded in zip(conversations, every, strict=True):
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        turns, turn = [], []
        for token, trained in zip(encoded.ids, encoded.trained, strict=True):
            if trained:
                turn.append(token)
                if token == tokenizer.eos_token_id:
                    turns.append(turn)
                    turn = []
        assert not turn
        assert len(turns) == len(answers)
        for ids, answer in zip(turns, answers, strict=True):
            expected = answer if version == 1 else answer.rstrip(" ")
            assert ids[:-1] == text_tokenizer.encode(expected, bos=False, eos=False)
