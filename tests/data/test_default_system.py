"""A saved chat template writes the system prompt that trained, to the character and to the token."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.tiny import write_model, write_tokenizer
from tests.training.jobs import tiny_recipe
from tune.data.load import load_data
from tune.data.templates.default_system import split_system, with_system
from tune.errors import DataError

SHOWN = "{% for message in messages %}{{ message['role'] }}<{{ message['content'] }}>{% endfor %}"
OWN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""A chat template that a base brings."""
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + OWN
SYSTEM = "You keep the lamp.\nSay \"it's {{ lit }}\" {% or %} 'not' \\n, naïve 灯台."

PIECES = (
    *("{{", "}}", "{%", "%}", "{#", "#}", "{", "}", "%", "#", "-", "{%- generation -%}", "{% endgeneration %}"),
    *("'", '"', "\\", "\\n", "\\'", "\\x41", "\\u0041", "\\N{BULLET}", "' ~ '", "'}] + messages %}"),
    *("\n", "\r", "\r\n", "\t", " ", "\x0b", "\x0c", "\x85", "\u2028", "\x00", "\x7f", "\ufeff"),
    *("ü", "你好", "🙂", "e\u0301", "a", "word", "messages", "{% endif %}"),
)


def prompts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(count)]


def rendered(jinja: str, *messages: tuple[str, str], mask: bool = False) -> tuple[str, object]:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = [{"role": role, "content": content} for role, content in messages]
    texts, spans = render_jinja_template(
        conversations=[given], chat_template=jinja, return_assistant_tokens_mask=mask, eos_token="</s>"
    )
    return texts[0], spans[0] if spans else []


def test_any_prompt_survives_to_the_character() -> None:
    for prompt in [*prompts(1500), *PIECES, SYSTEM]:
        jinja = with_system(SHOWN, prompt)
        assert rendered(jinja, ("user", "hi"))[0] == f"system<{prompt}>user<hi>", repr(prompt)
        assert split_system(jinja) == (prompt, SHOWN), repr(prompt)


def test_a_prompt_survives_the_file_that_a_tokenizer_saves(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for prompt in ["\r\n".join(prompts(200)), SYSTEM]:
        write_tokenizer(tmp_path, with_system(SHOWN, prompt))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == (
            f"system<{prompt}>user<hi>"
        )


@pytest.mark.parametrize(
    "start", ["", "\n", "\n\n", "  ", "\n  ", "text\n", "{# a remark #}\n", "{%- set a = 1 -%}\n", "{{ eos_token }}\n"]
)
def test_the_rest_is_read_as_if_it_stood_alone(start: str) -> None:
    jinja = with_system(start + SHOWN, SYSTEM)
    messages = (("system", "own"), ("user", "hi"))
    assert rendered(jinja, *messages) == rendered(start + SHOWN, *messages), "a system message of one's own wins"
    assert rendered(jinja, messages[1]) == rendered(start + SHOWN, ("system", SYSTEM), messages[1])


def test_a_prompt_that_spells_tags_marks_nothing_as_trained() -> None:
    from tune.data.templates.jinja_writing import GENERATION

    spelled = "{% generation %}x{%- endgeneration -%}"
    assert not GENERATION.search(with_system(OWN, spelled))
    marking = SHOWN.replace("{{ message['content'] }}", "{% generation %}{{ message['content'] }}{% endgeneration %}")
    text, spans = rendered(with_system(marking, "s" + spelled), ("user", "hi"), mask=True)
    assert [text[start:end] for start, end in spans] == ["s" + spelled, "hi"]


def test_the_last_prompt_stands_alone() -> None:
    assert with_system(SHOWN, None) == with_system(SHOWN, "") == SHOWN
    assert split_system(SHOWN) == (None, SHOWN)
    twice = with_system(with_system(SHOWN, "first"), "second")
    assert twice == with_system(SHOWN, "second")
    assert with_system(twice, None) == twice, "a base's own default goes on, as it was trained with it"


def write_base(folder: Path, chat_template: str) -> Path:
    """A model whose tokenizer knows ChatML's tokens and has a chat template of its own."""
    from transformers import AutoTokenizer

    write_model(folder, "mistral", vocab_size=386)
    write_tokenizer(folder, chat_template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("template", ["alpaca", "chatml", "mistral-v1", "vicuna", "tokenizer"])
def test_who_sends_no_system_message_gets_the_prompt_that_trained(tmp_path: Path, template: str) -> None:
    from transformers import AutoTokenizer

    from tune.run import train

    write_base(tmp_path / "base", OWN)
    recipe = tiny_recipe(tmp_path, base=tmp_path / "base", data__template=template, data__system=SYSTEM)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    seen = load_data(recipe, AutoTokenizer.from_pretrained(tmp_path / "base")).train
    adapter = train(recipe).adapter

    saved = AutoTokenizer.from_pretrained(adapter)
    assert (adapter / "chat_template.jinja").is_file()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == len(seen)
    for number, row in enumerate(rows):
        turns = [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        ids = saved.apply_chat_template(turns, return_dict=False)
        assert saved.decode(ids).count("You keep the lamp.") == 1
        assert ids == seen.example(number)[0].tolist()
    own = [{"role": "system", "content": "Another."}, {"role": "user", "content": "hi"}]
    text = saved.apply_chat_template(own, tokenize=False)
    assert "Another." in text
    assert "You keep the lamp." not in text


def test_a_template_without_a_system_role_refuses_the_recipe(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_base(tmp_path / "base", REFUSING)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    without = tiny_recipe(tmp_path, base=tmp_path / "base", data__template="tokenizer")
    assert len(load_data(without, tokenizer).train) == 40
    for bad in ("error", "drop"):
        recipe = tiny_recipe(
            tmp_path, base=tmp_path / "base", data__template="tokenizer", data__system="x", data__on_bad=bad
        )
        with pytest.raises(DataError, match="no system role here" if bad == "error" else "no row is left"):
            load_data(recipe, tokenizer)
