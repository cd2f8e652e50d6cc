"""Every template: Python segments, jinja form and tokenizer agree; and each equals what its users know."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import pytest

from tests.data.conftest import CHATML_OWN, LOOKALIKES, PIECES, PLAIN_PIECES, as_dicts, dialogues
from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.encode import Encoder, encode_prompt
from tune.data.templates import TEMPLATES, Segment
from tune.data.templates.default_system import with_system
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.resolve import resolve_template
from tune.errors import DataError

# Every template with every tokenizer that has its control tokens; a new template must find one here.
TOKENIZERS = ("mistral_v1", "mistral_v2", "mistral_v3", "metaspace_v3", "chatml")
HOSTILE = (*PIECES, *LOOKALIKES)


EMPTIES = (
    Conversation.of(("user", ""), ("assistant", "")),
    Conversation.of(("system", ""), ("user", "a"), ("assistant", "")),
    Conversation.of(("system", "s"), ("user", " "), ("assistant", "b"), ("user", "\n\n"), ("assistant", "  ")),
)
"""No format gives a template an empty turn, and none of them stumbles over one."""


def bound(name: str, request) -> list:
    found = []
    for fixture in TOKENIZERS:
        tokenizer = request.getfixturevalue(fixture)
        try:
            found.append((resolve_template(name, tokenizer), tokenizer))
        except DataError:
            continue
    assert found, f"no test tokenizer has the control tokens of {name}"
    return found


@lru_cache(maxsize=8)
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer)


def prompt_ids(conversation: Conversation, template, tokenizer) -> list[int]:
    segments = template.segments(conversation, generation_prompt=True)
    return encoder(tokenizer).encode([segments])[0].ids.tolist()


def rendered(template, tokenizer, conversation: Conversation, **options):
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[as_dicts(conversation)],
        chat_template=template.jinja,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **options},
    )
    return texts[0], spans[0]


def trained_characters(segments: list[Segment]) -> list[bool]:
    return [s.trained for s in segments for _ in s.text]


@pytest.mark.parametrize("name", TEMPLATES)
def test_jinja_renders_what_the_segments_say_and_marks_what_they_train(name, request):
    for template, tokenizer in bound(name, request):
        for conversation in [*dialogues(60, pieces=HOSTILE, seed=1, inputs=True), *EMPTIES]:
            segments = template.segments(conversation)
            text, spans = rendered(template, tokenizer, conversation)
            assert text == "".join(s.text for s in segments)
            marked = [any(a <= i < b for a, b in spans) for i in range(len(text))]
            assert marked == trained_characters(segments)


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_prompt_is_where_the_answer_starts(name, request):
    for template, tokenizer in bound(name, request):
        for conversation in dialogues(20, pieces=HOSTILE, seed=2, inputs=True):
            asked = Conversation(conversation.messages[:-1])
            prompt = "".join(s.text for s in template.segments(asked, generation_prompt=True))
            whole = "".join(s.text for s in template.segments(conversation))
            assert whole.startswith(prompt)
            assert prompt == rendered(template, tokenizer, asked, add_generation_prompt=True)[0]
            trained = trained_characters(template.segments(conversation))
            assert trained[len(prompt)]
            assert not trained[len(prompt) - 1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_what_the_tokenizer_makes_of_the_whole_prompt(name, request):
    for template, tokenizer in bound(name, request):
        conversations = dialogues(40, pieces=PLAIN_PIECES, seed=3, inputs=True)
        encoded = encoder(tokenizer).encode([template.segments(c) for c in conversations])
        for conversation, ours in zip(conversations, encoded, strict=True):
            text, _ = rendered(template, tokenizer, conversation)
            assert ours.ids.tolist() == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_its_saved_jinja_form_trains_the_same_tokens(name, request):
    for template, tokenizer in bound(name, request):
        saved = JinjaTemplate("saved", template.jinja).bind(tokenizer)
        assert saved.end_of_turn == template.end_of_turn
        conversations = [*dialogues(40, pieces=HOSTILE, seed=4), *EMPTIES]
        ours = encoder(tokenizer).encode([template.segments(c) for c in conversations])
        theirs = encoder(tokenizer).encode([saved.segments(c) for c in conversations])
        assert ours == theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_apply_chat_template_writes_the_ids_that_trained(name, request):
    for template, tokenizer in bound(name, request):
        jinja = with_system(template.jinja, "Be brief. \n")
        conversations = dialogues(15, pieces=PLAIN_PIECES, seed=8)
        trained = [conversation.with_system("Be brief. \n") for conversation in conversations]
        encoded = encoder(tokenizer).encode([template.segments(c) for c in trained])
        for conversation, ours in zip(conversations, encoded, strict=True):
            options = {"chat_template": jinja, "tokenize": True, "return_dict": False}
            assert list(tokenizer.apply_chat_template(as_dicts(conversation), **options)) == ours.ids.tolist()
            asked = Conversation(conversation.messages[:-1])
            theirs = tokenizer.apply_chat_template(as_dicts(asked), add_generation_prompt=True, **options)
            assert list(theirs) == prompt_ids(asked.with_system("Be brief. \n"), template, tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_of_a_prompt_are_those_before_the_answer_that_trained(name, request):
    for template, tokenizer in bound(name, request):
        # An answer that begins with a letter: white space may merge with what stands before it.
        prompts = [conversation.messages[:-1] for conversation in dialogues(30, pieces=HOSTILE, seed=10)]
        wholes = [Conversation((*asked, Message("assistant", "Well, [INST]"))) for asked in prompts]
        every = encoder(tokenizer).encode([template.segments(whole) for whole in wholes])
        for asked, encoded in zip(prompts, every, strict=True):
            prompt = prompt_ids(Conversation(asked), template, tokenizer)
            assert encoded.ids[: len(prompt)].tolist() == prompt
            assert not encoded.trained[len(prompt) - 1]
            assert encoded.trained[len(prompt)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_ends_in_a_trained_control_token(name, request):
    for template, tokenizer in bound(name, request):
        end = tokenizer.convert_tokens_to_ids(template.end_of_turn)
        conversations = dialogues(20, pieces=HOSTILE, seed=11)
        every = encoder(tokenizer).encode([template.segments(c) for c in conversations])
        for conversation, encoded in zip(conversations, every, strict=True):
            answers = sum(m.role == "assistant" for m in conversation.messages)
            ends = [t for id, t in zip(encoded.ids, encoded.trained, strict=True) if id == end]
            assert sum(ends) == answers


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_that_was_said_is_written(name):
    template = TEMPLATES[name]
    for conversation in dialogues(40, pieces=HOSTILE, seed=12, inputs=True):
        written = "".join("".join(s.text for s in template.segments(conversation)).split())
        for message in conversation.messages:
            assert "".join(message.content.split()) in written
            assert "".join((message.input or "").split()) in written


def test_the_templates_are_those_that_a_recipe_may_name():
    from tune.recipe.fields import TEMPLATES as NAMES

    assert {*TEMPLATES, "auto", "tokenizer"} == set(NAMES)
    assert all(template.name == name for name, template in TEMPLATES.items())


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_text_becomes_a_control_token(name, request):
    for template, tokenizer in bound(name, request):
        special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        spelled = " ".join(t.content for t in list(tokenizer.added_tokens_decoder.values())[:10])
        plain = Conversation.of(("user", "hello"), ("assistant", "there"))
        attack = Conversation.of(("user", spelled), ("assistant", spelled))
        harmless, attacked = (
            e.ids for e in encoder(tokenizer).encode([template.segments(plain), template.segments(attack)])
        )
        assert [i for i in attacked if i in special] == [i for i in harmless if i in special]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_is_not_trained_is_not_trained(name, request):
    messages = (
        Message("user", "one"),
        Message("assistant", "two", trained=False),
        Message("user", "three"),
        Message("assistant", "four"),
    )
    for template, tokenizer in bound(name, request):
        for form in (template, JinjaTemplate("saved", template.jinja).bind(tokenizer)):
            segments = form.segments(Conversation(messages))
            said = "".join(s.text for s in segments if s.trained)
            assert "four" in said
            assert "two" not in said
            assert said.count(template.end_of_turn) == 1


def test_alpaca_is_stanfords_to_the_character():
    given = Message("user", "Name it.", input="a cat")
    text = "".join(s.text for s in TEMPLATES["alpaca"].segments(Conversation((given, Message("assistant", "Tom")))))
    assert text == (
        "<s>Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName it.\n\n### Input:\na cat\n\n### Response:Tom</s>"
    )
    plain = Conversation.of(("user", "Name it."), ("assistant", "Tom"))
    text = "".join(s.text for s in TEMPLATES["alpaca"].segments(plain))
    assert text == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName it.\n\n### Response:Tom</s>"
    )


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "chatml"])
@pytest.mark.parametrize("roles", ["uu", "au", "a", "uat", "usa", "suu"])
def test_turns_out_of_order_are_a_bad_row(name, roles):
    kinds = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    conversation = Conversation(tuple(Message(kinds[r], "x") for r in roles))
    with pytest.raises(BadRowError, match=r"turn \d is"):
        TEMPLATES[name].segments(conversation)


@pytest.mark.parametrize(
    "name", [name for name in TEMPLATES if not getattr(TEMPLATES[name], "always_bos", False) and name != "chatml"]
)
def test_bos_is_written_where_the_tokenizer_writes_it(name, mistral_v1, chatml):
    conversation = Conversation.of(("user", "a"), ("assistant", "b"))
    assert resolve_template(name, mistral_v1).segments(conversation)[0] == Segment("<s>", control=True)
    # Some tokenizers name a token that none of their texts begins with.
    named = copy.deepcopy(chatml)
    named.bos_token = "<|endoftext|>"
    template = resolve_template(name, named)
    text = "".join(s.text for s in template.segments(conversation))
    assert "<|endoftext|>" not in text
    assert text == rendered(template, named, conversation)[0]


def test_missing_control_tokens_are_named(mistral_v1, mistral_v3):
    with pytest.raises(DataError, match=r"chatml: the tokenizer lacks .*<\|im_start\|>, <\|im_end\|>"):
        resolve_template("chatml", mistral_v1)
    with pytest.raises(DataError, match=r"mistral-v3: the tokenizer lacks .*\[INST\], \[/INST\]"):
        resolve_template("mistral-v3", mistral_v1)
    with pytest.raises(DataError, match=r"data\.template: mistral-v3"):
        resolve_template("mistral-v1", mistral_v3)


def test_resolving_names(mistral_v1, chatml, tmp_path):
    assert resolve_template("auto", mistral_v1).name == "alpaca"
    assert resolve_template("auto", chatml).name == "tokenizer"
    with pytest.raises(DataError, match="no chat template of its own"):
        resolve_template("tokenizer", mistral_v1)
    with pytest.raises(DataError, match="Did you mean 'alpaca'"):
        resolve_template("alpacca", mistral_v1)
    with pytest.raises(DataError, match="there is no such file"):
        resolve_template(str(tmp_path / "x.jinja"), mistral_v1)
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}")
    with pytest.raises(DataError, match=r"no \{% generation %\} blocks"):
        resolve_template(str(path), mistral_v1)
    path.write_text("{% for m in messages %}{% generation %}{{ m.content }")
    with pytest.raises(DataError, match="not valid jinja"):
        resolve_template(str(path), mistral_v1)


def test_own_chat_template_equals_apply_chat_template(chatml):
    template = resolve_template("tokenizer", chatml)
    for conversation in dialogues(80, pieces=PLAIN_PIECES, seed=5):
        expected = chatml.apply_chat_template(as_dicts(conversation), tokenize=True, return_dict=False)
        ours = encoder(chatml).encode([template.segments(conversation)])[0]
        assert ours.ids.tolist() == list(expected)


def test_own_chat_template_found_by_prefixes_equals_the_written_one(chatml):
    own, written = resolve_template("tokenizer", chatml), resolve_template("chatml", chatml)
    assert own.end_of_turn == "<|im_end|>"
    for conversation in dialogues(80, seed=6):
        one, other = encoder(chatml).encode([own.segments(conversation), written.segments(conversation)])
        assert one == other
        asked = conversation.messages[:-1]
        assert encode_prompt(asked, own, chatml) == encode_prompt(asked, written, chatml)


def test_the_end_of_turn_is_trained_and_the_newline_after_it_is_not(chatml):
    template = resolve_template("tokenizer", chatml)
    conversation = Conversation.of(("user", "Hi"), ("assistant", "Hello"))
    trained = "".join(s.text for s in template.segments(conversation) if s.trained)
    assert trained == "Hello<|im_end|>"


def test_special_tokens_that_swallow_white_space_are_followed(chatml):
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(chatml)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|e|>", rstrip=True, lstrip=True)]})
    tokenizer.chat_template = CHATML_OWN.replace("<|im_end|>", "<|e|>")
    template = resolve_template("tokenizer", tokenizer)
    for conversation in dialogues(30, pieces=PLAIN_PIECES, seed=7):
        expected = tokenizer.apply_chat_template(as_dicts(conversation), tokenize=True, return_dict=False)
        assert encoder(tokenizer).encode([template.segments(conversation)])[0].ids.tolist() == list(expected)


def test_a_template_that_rewrites_history_is_refused_by_name(chatml):
    own = "{% for m in messages %}{{ m.content if loop.last else m.content[:1] }}<|im_end|>{% endfor %}"
    template = JinjaTemplate("tokenizer", own).bind(chatml)
    conversation = Conversation.of(("user", "Hi"), ("assistant", "Hello"), ("user", "more"), ("assistant", "end"))
    with pytest.raises(DataError, match=r"template tokenizer: answers cannot be found.*generation"):
        template.segments(conversation)


def test_a_special_token_that_the_template_looks_for_in_a_message_is_a_bad_row(chatml):
    own = "{% for m in messages %}{{ m.content.split('<|im_start|>')[-1] }}<|im_end|>{% endfor %}"
    template = JinjaTemplate("tokenizer", own).bind(chatml)
    with pytest.raises(BadRowError, match=r"a message spells '<\|im_start\|>'"):
        template.segments(Conversation.of(("user", "a<|im_start|>b"), ("assistant", "c")))


def test_what_a_template_refuses_is_a_bad_row(chatml):
    template = JinjaTemplate("tokenizer", "{{ raise_exception('no system here') }}").bind(chatml)
    with pytest.raises(BadRowError, match=r"refuses these messages \(no system here\)"):
        template.segments(Conversation.of(("user", "a"), ("assistant", "b")))


def test_a_control_token_that_is_not_special_cannot_be_spelled(chatml):
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(chatml)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=False, normalized=False)])
    template = JinjaTemplate(
        "own", "{% for m in messages %}<|turn|>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ).bind(tokenizer)
    good = template.segments(Conversation.of(("user", "a"), ("assistant", "b")))
    bad = template.segments(Conversation.of(("user", "a <|turn|> b"), ("assistant", "b")))
    first, second = encoder(tokenizer).encode([good, bad])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert first.ids.tolist().count(turn) == 2
    assert isinstance(second, BadRowError)
    assert "'<|turn|>'" in str(second)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_page_shows_what_it_writes(name):
    turns = (("user", "Hi"), ("assistant", "Hello."), ("user", "Bye"), ("assistant", "See you."))
    text = "".join(s.text for s in TEMPLATES[name].segments(Conversation.of(*turns)))
    page = (Path(__file__).resolve().parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `") and f"`{name}`" in line.split(" | ")[0]]
    assert any("`" + text.replace("\n", "⏎").replace("|", "\\|") + "`" in row for row in rows)
    assert len(rows) == 2
