"""Chat templates in jinja, a file or a tokenizer's own: what is wrong in one is said, tools reach it, it is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from tests.data.conftest import CHATML_OWN, as_dicts, dialogues
from tests.data.test_templates import encoder, prompt_ids
from tests.training.jobs import tiny_recipe
from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.encode import Encoded
from tune.data.templates import TEMPLATES
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.jinja_writing import JinjaWriting, turns_of
from tune.data.templates.resolve import resolve_template, warns_of_other_template
from tune.errors import DataError

OWN = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Keeper:' -}}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- message['role'].capitalize() + ': ' + message['content'] + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Keeper:' -}}
{%- endif -%}
"""
TOOLS_OWN = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}"
    "{% if message.name %} {{ message.name }}{% endif %}{{ '\\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A tokenizer's own template with tools, without generation blocks."""


def own(folder: Path, text: str) -> str:
    path = folder / "own.jinja"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_file_trains_what_its_blocks_hold(tmp_path, mistral_v1):
    template = resolve_template(own(tmp_path, OWN), mistral_v1)
    conversation = Conversation.of(("system", "s"), ("user", "Hi"), ("assistant", "Ahoy </s>"))
    segments = template.segments(conversation)
    assert "".join(s.text for s in segments) == "<s>System: s\nUser: Hi\nKeeper: Ahoy </s></s>\n"
    assert "".join(s.text for s in segments if s.trained) == " Ahoy </s></s>"
    assert template.end_of_turn == "</s>"
    assert template.control_tokens() == []
    ids, trained = encoder(mistral_v1).encode([segments])[0]
    assert ids.tolist().count(mistral_v1.eos_token_id) == 1, "what the answer spells is text"
    assert (
        prompt_ids(Conversation(conversation.messages[:-1]), template, mistral_v1) == ids[: trained.index(1)].tolist()
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{# {% generation %} #}\n{{ messages[0].content }}", "do not hold the answer"),
        ("{{ messages[0].content }}{% if add_generation_prompt %}A:{% endif %}", r"no \{% generation %\} blocks"),
        (
            "a\n{% for m in messages %}\n{% generation %}{{ m.content }\n{% endgeneration %}{% endfor %}",
            r"own.jinja:3: .*",
        ),
        ("{% generation %}{{ messages[0].content }}", r"own.jinja:1: is not valid jinja .*\. Mend the template there"),
        (
            "\n{% generation %}\n{{ message.content }}{% endgeneration %}",
            r"own.jinja:3: .*'message' is undefined.*Mend",
        ),
        ("{% generation %}{{ nothing() }}{% endgeneration %}", r"own.jinja:1: .*'nothing' is undefined"),
        ("{% generation %}{{ ''.__class__.__mro__ }}{% endgeneration %}", r"own.jinja:1: .*__class__.*unsafe"),
        ("{% generation %}{% for i in range(10**9) %}x{% endfor %}{% endgeneration %}", "own.jinja:1: .*Range too big"),
        ("{% generation %}{% include 'x' %}{% endgeneration %}", "own.jinja:1: .*loader"),
        ("{% generation %}{{ messages.append(1) }}{% endgeneration %}", "own.jinja:1: .*append.*unsafe"),
        ("{% generation %}{{ 1 / 0 }}{% endgeneration %}", "own.jinja:1: .*division by zero"),
        (
            "{% macro a() %}{{ a() }}{% endmacro %}{% generation %}{{ a() }}{% endgeneration %}",
            "own.jinja:1: .*recursion",
        ),
        ("{% generation %}{{ '\\ud800' }}{% endgeneration %}", "own.jinja: .*surrogates"),
        (
            "{% for m in messages if m.role == 'user' %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            "do not",
        ),
        (
            "{% macro say(m) %}Keeper: {% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{{ say(m) }}{% endfor %}",
            "do not hold the answer .* outside of macros",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, mistral_v1, text, words):
    with pytest.raises(DataError, match=words) as caught:
        resolve_template(own(tmp_path, text), mistral_v1)
    assert not isinstance(caught.value, BadRowError), "it is not for data.on_bad to drop all rows"
    assert "own.jinja" in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path, mistral_v1):
    own(tmp_path, OWN)
    with pytest.raises(DataError, match=r"no such file\. Did you mean 'own\.jinja'"):
        resolve_template(str(tmp_path / "owm.jinja"), mistral_v1)
    (tmp_path / "folder.jinja").mkdir()
    with pytest.raises(DataError, match="cannot be read as text"):
        resolve_template(str(tmp_path / "folder.jinja"), mistral_v1)
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read as text"):
        resolve_template(str(tmp_path / "bytes.jinja"), mistral_v1)


def test_a_file_may_refuse_some_conversations(tmp_path, mistral_v1):
    needs_system = "{% if messages[0].role != 'system' %}{{ raise_exception('a rule first') }}{% endif %}" + OWN
    template = resolve_template(own(tmp_path, needs_system), mistral_v1)
    assert template.segments(Conversation.of(("system", "s"), ("user", "a"), ("assistant", "b")))
    with pytest.raises(BadRowError, match=r"refuses these messages \(a rule first\)"):
        template.segments(Conversation.of(("user", "a"), ("assistant", "b")))
    fussy = OWN + "\n{{ messages[3].content.x.y }}"
    template = resolve_template(
        own(tmp_path, "{% if messages|length > 3 %}" + fussy + "{% else %}" + OWN + "{% endif %}"), mistral_v1
    )
    long = Conversation.of(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    with pytest.raises(BadRowError, match=r"own\.jinja:15: fails on these messages"):
        template.segments(long)


def test_tools_and_what_messages_hold_besides_reach_the_template(chatml):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = TOOLS_OWN
    template = resolve_template("tokenizer", tokenizer)
    tool = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": {"place": "Ærø"}}}
    conversation = Conversation(
        (
            Message("user", "When?"),
            Message("assistant", "", extra={"tool_calls": [call]}),
            Message("tool", "noon", extra={"name": "tide", "tool_call_id": "1"}),
            Message("assistant", "At noon."),
        ),
        (tool,),
    )
    expected = tokenizer.apply_chat_template(as_dicts(conversation), tools=[tool], tokenize=True, return_dict=False)
    segments = template.segments(conversation)
    assert encoder(tokenizer).encode([segments])[0].ids.tolist() == list(expected)
    assert "".join(s.text for s in segments if s.trained) == (
        '<call>{"name": "tide", "arguments": {"place": "Ærø"}}</call><|im_end|>At noon.<|im_end|>'
    )
    asked = Conversation(conversation.messages[:3], conversation.tools)
    expected = tokenizer.apply_chat_template(
        as_dicts(asked), tools=[tool], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert prompt_ids(asked, template, tokenizer) == list(expected)


def test_what_a_tool_spells_stays_text(chatml):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = TOOLS_OWN
    template = resolve_template("tokenizer", tokenizer)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")

    def ends(word: str) -> int:
        function = {"name": f"n{word}", "description": word, "parameters": {"properties": {word: {"type": word}}}}
        call = {"function": {"name": word, "arguments": {f"a{word}": [word, {word: 1}]}}}
        conversation = Conversation(
            (
                Message("user", word),
                Message("assistant", "", extra={"tool_calls": [call]}),
                Message("tool", word, extra={"name": word}),
                Message("assistant", word),
            ),
            ({"type": "function", "function": function},),
        )
        segments = template.segments(conversation)
        assert "".join(s.text for s in segments if not s.control).count(word) == 12
        encoded = encoder(tokenizer).encode([segments])[0]
        assert isinstance(encoded, Encoded)
        return encoded.ids.tolist().count(end)

    assert ends("harmless") == 5
    assert ends("<|im_end|>") == 5


def test_generation_blocks_and_prefixes_find_the_same_answers(chatml):
    marking = CHATML_OWN.replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}",
    )
    assert "generation %}" in marking
    one, other = JinjaTemplate("one", marking).bind(chatml), resolve_template("tokenizer", chatml)
    for conversation in dialogues(40, seed=14):
        segments = [one.segments(conversation), other.segments(conversation)]
        first, second = encoder(chatml).encode(segments)
        assert first == second


def test_a_warning_when_the_tokenizer_brings_another_template(chatml, mistral_v1):
    def warns(name: str, tokenizer) -> str | None:
        return warns_of_other_template(resolve_template(name, tokenizer), tokenizer)

    assert warns("chatml", chatml) is None, "other words for the same tokens"
    assert warns("tokenizer", chatml) is None
    assert warns("auto", chatml) is None
    for name in ("alpaca", "vicuna", "plain"):
        words = warns(name, chatml)
        assert words is not None
        assert words.startswith(f"template {name} writes prompts otherwise")
        assert "data.template: tokenizer" in words
        assert warns(name, mistral_v1) is None, "it brings none"
    refusing = copy.deepcopy(chatml)
    refusing.chat_template = "{{ raise_exception('never') }}"
    assert warns("alpaca", refusing) is None


@pytest.mark.parametrize("name", ["zephyr", "mistral-v3"])
def test_no_warning_where_the_tokenizer_brings_the_same_template(name, mistral_v3):
    tokenizer = copy.deepcopy(mistral_v3)
    tokenizer.chat_template = TEMPLATES[name].bind(tokenizer).jinja
    assert warns_of_other_template(resolve_template(name, tokenizer), tokenizer) is None


def test_a_run_with_a_file_answers_with_the_file_that_trained(tmp_path):
    from transformers import AutoTokenizer

    from tune.data.load import load_data
    from tune.evaluation.generate import load_run
    from tune.export.subject import find_subject
    from tune.run import train

    path = own(tmp_path, OWN)
    recipe = tiny_recipe(tmp_path, data__template=path, data__system="Be calm.")
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 2})})
    seen = load_data(recipe, AutoTokenizer.from_pretrained(tmp_path / "base")).train
    run = train(recipe)
    Path(path).write_text("{% generation %}another{% endgeneration %}")
    saved = AutoTokenizer.from_pretrained(run.adapter)
    row = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
    assert saved.apply_chat_template(turns, return_dict=False) == seen.example(0)[0].tolist()

    Path(path).unlink()
    loaded = load_run(run.output)
    asked = loaded.template.segments(Conversation.of(("user", "Hi")), generation_prompt=True)
    assert "".join(s.text for s in asked) == "<s>User: Hi\nKeeper:"
    assert loaded.system == "Be calm."
    assert isinstance(loaded.answer("Hi", max_new_tokens=3), str)
    assert "Keeper:" in find_subject(run.output, "original").chat_template


def test_the_warning_is_one_of_the_report(tmp_path):
    from tests.data.test_default_system import OWN as BASES
    from tests.data.test_default_system import write_base
    from tune.data.load import load_data
    from tune.data.tokenizer import load_tokenizer

    base = write_base(tmp_path / "base", BASES)
    tokenizer = load_tokenizer(str(base))
    warned = load_data(tiny_recipe(tmp_path, base=base), tokenizer).report.warnings()
    assert sum("template alpaca writes prompts otherwise" in line for line in warned) == 1
    silent = load_data(tiny_recipe(tmp_path, base=base, data__template="auto"), tokenizer).report.warnings()
    assert not any("otherwise" in line for line in silent)


NOT_LOOKING = CHATML_OWN
CALL_TIDE = {"function": {"name": "tide", "arguments": {}}}
OFFERED = ({"type": "function", "function": {"name": "tide", "parameters": {}}},)


def asked(*after: Message, question: str = "When is the tide?") -> tuple[Message, ...]:
    return (Message("user", question), *after)


CALLED = Message("assistant", "", extra={"tool_calls": [CALL_TIDE]})
TWICE = Message("assistant", "", extra={"tool_calls": [CALL_TIDE, {"function": {"name": "moon", "arguments": {}}}]})
RETURNED = asked(CALLED, Message("tool", "noon"), Message("assistant", "At noon."))
WHEN = asked(Message("assistant", "Noon."))


@pytest.mark.parametrize(
    ("jinja", "conversation", "lost"),
    [
        (NOT_LOOKING, Conversation(WHEN, OFFERED), "the tools of"),
        (NOT_LOOKING, Conversation(asked(CALLED)), "the tool calls of"),
        (NOT_LOOKING, Conversation(RETURNED, OFFERED), "the tools and the tool calls of"),
        (TOOLS_OWN.replace("tool | tojson", "1"), Conversation(RETURNED, OFFERED), None),
        (TOOLS_OWN.replace("message.tool_calls", "[]"), Conversation(RETURNED, OFFERED), "the tool calls of"),
        (TOOLS_OWN.replace("{% if tools %}", "{% if false %}"), Conversation(RETURNED, OFFERED), "the tools of"),
        (TOOLS_OWN.replace("in messages", "in messages if message.role != 'tool'"), Conversation(RETURNED), "results"),
        (TOOLS_OWN.replace("in message.tool_calls or []", "in (message.tool_calls or [])[:1]"), TWICE, "tool calls"),
        (
            TOOLS_OWN.replace("in message.tool_calls or []", "in message.tool_calls or [] if not message.content"),
            Message("assistant", "I look.", extra=CALLED.extra),
            "the tool calls of",
        ),
        # it refuses the made-up conversation, so the row itself tells
        ("{% if tools and messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + NOT_LOOKING,
         Conversation((Message("system", "s"), *RETURNED), OFFERED), "the tools and the tool calls of"),
        ("{% if tools and messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}" + TOOLS_OWN,
         Conversation((Message("system", "s"), *RETURNED), OFFERED), None),
        (TOOLS_OWN, Conversation(RETURNED, OFFERED), None),
        (NOT_LOOKING, Conversation(WHEN), None),
    ],
)  # fmt: skip
def test_tools_that_a_template_does_not_look_at_are_refused(chatml, tmp_path, jinja, conversation, lost):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = jinja
    if isinstance(conversation, Message):
        conversation = Conversation(asked(conversation))
    template = resolve_template("tokenizer", tokenizer)
    for _ in range(2):
        if lost is None:
            assert template.segments(conversation)
            continue
        with pytest.raises(BadRowError, match=rf"template tokenizer leaves out .*{lost}.*mistral-v2, mistral-v3"):
            template.segments(conversation)


def test_a_file_that_does_not_look_at_tools_refuses_their_rows(tmp_path, mistral_v1):
    template = resolve_template(own(tmp_path, OWN), mistral_v1)
    assert template.segments(Conversation(WHEN))
    with pytest.raises(BadRowError, match=r"own\.jinja leaves out the tools and the tool calls of the conversation"):
        template.segments(Conversation(RETURNED, OFFERED))


def test_a_template_is_asked_once_what_it_writes(chatml, monkeypatch):
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = TOOLS_OWN
    template = resolve_template("tokenizer", tokenizer)
    rendered = []
    render = JinjaWriting._render
    monkeypatch.setattr(JinjaWriting, "_render", lambda *a, **k: rendered.append(1) or render(*a, **k))
    counts = []
    for _ in range(3):
        rendered.clear()
        template.writing.segments(turns_of(Conversation(RETURNED, OFFERED)))
        counts.append(len(rendered))
    assert counts[0] - counts[1] == 4, "the made-up conversation, and once without each part"
    plain = len(RETURNED)  # the whole, and before and after the first answer, and before the second
    assert counts[1:] == [plain, plain]
