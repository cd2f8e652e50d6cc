"""Templates that cannot be used, some of them made to do harm: told by name and line before the weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.data_mistakes import assert_refused_by_check, assert_told_in_the_same_words, data, folder, source
from tests.cli.mistakes import Mistake, mistake

JINJA = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"


def jinja(text: str | bytes) -> Callable[[Path], object]:
    return data(text, "own.jinja")


MISTAKES = [
    mistake("template of other tokens", "mistral-v3", "[INST], [/INST]", "alpaca", data__template="mistral-v3"),
    mistake("template of other tokens for one source", "chatml", "<|im_start|>", data__train=source(template="chatml")),
    mistake("tokenizer without template", "no chat template", "alpaca", data__template="tokenizer"),
    mistake(
        "jinja missing",
        "own.jnja.jinja: there is no such file",
        "own.jinja",
        prepare=jinja(JINJA),
        data__template="own.jnja.jinja",
    ),
    mistake("jinja a folder", "own.jinja", prepare=folder("own.jinja"), data__template="own.jinja"),
    mistake(
        "jinja not text", "own.jinja", "text", prepare=jinja(b"\xff\xfe{% generation %}"), data__template="own.jinja"
    ),
    mistake("jinja empty", "own.jinja", "{% generation %}", prepare=jinja(""), data__template="own.jinja"),
    mistake(
        "jinja without generation",
        "own.jinja",
        "{% generation %}",
        prepare=jinja("{{ messages[0].content }}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja of wrong syntax",
        "own.jinja:2: is not valid jinja",
        prepare=jinja(f"{JINJA}\n{{% if %}}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja with an unknown filter",
        "own.jinja:1",
        "'shout'",
        prepare=jinja(JINJA.replace("m.content", "m.content | shout")),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that changes what it is given",
        "own.jinja",
        prepare=jinja(JINJA + "{{ messages.append(1) }}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that does not end",
        "own.jinja",
        prepare=jinja(JINJA + "{% for i in range(10 ** 9) %}{% endfor %}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that divides by nothing",
        "own.jinja",
        prepare=jinja(JINJA + "{{ 1 / 0 }}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that calls itself",
        "own.jinja",
        prepare=jinja(JINJA + "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that fills the memory",
        "own.jinja:1: ",
        "more memory than there is",
        prepare=jinja(JINJA + "{{ 'x' * 10 ** 15 }}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that includes a file",
        "own.jinja",
        prepare=jinja(JINJA + "{% include 'recipe.yaml' %}"),
        data__template="own.jinja",
    ),
    mistake(
        "jinja that refuses",
        "own.jinja",
        "no system",
        prepare=jinja(JINJA + "{{ raise_exception('no system') }}"),
        data__template="own.jinja",
        lines=4,
    ),
    mistake(
        "jinja that marks no answer",
        "own.jinja",
        prepare=jinja("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"),
        data__template="own.jinja",
    ),
]


@pytest.mark.parametrize("wrong", MISTAKES)
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused_by_check(wrong, work, capfd)


@pytest.mark.parametrize("wrong", MISTAKES[::6])
def test_training_says_the_same(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_told_in_the_same_words("train", wrong, work, capfd)
