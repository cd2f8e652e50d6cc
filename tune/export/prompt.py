"""How a run's prompts are written, shown on a question made up for the purpose and never on a row of the data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.data.templates import sandbox
from tune.data.templates.jinja_writing import JinjaWriting
from tune.data.templates.resolve import LONGEST
from tune.errors import DataError
from tune.files.foreign import read_object, read_plain

QUESTION = "What is the capital of France?"
ANSWER = "Paris."
_MOST = 256 << 20
"""Bytes of a tokenizer's file."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The template at work."""

    text: str
    """A question and its answer, written out."""
    stop: str | None = None
    """The token that ends an answer, where it is not the tokenizer's own end."""


def read_prompt(folder: Path, system: str | None = None) -> Prompt | None:
    """Render the chat_template.jinja of an adapter's or model's folder; None where there is none that renders."""
    try:
        jinja = read_plain(folder / "chat_template.jinja", LONGEST).decode("utf-8")
        config = read_object(folder / "tokenizer_config.json")
    except (OSError, ValueError):
        return None
    special = {}
    for name, value in config.items():
        content = _content(value) if name.endswith("_token") else None
        if content is not None:
            special[name] = content
    text = render(jinja, special, system)
    if text is None:
        return None
    after = text.rpartition(ANSWER)[2].strip()
    eos = special.get("eos_token", "")
    if not after or (eos and after.startswith(eos)):
        return Prompt(text)
    stops = [token for token in _added_tokens(folder) if after.startswith(token)]
    return Prompt(text, max(stops, key=len, default=None))


def render(jinja: str, special: dict[str, str], system: str | None = None) -> str | None:
    """The question and its answer as a chat template writes them; None where the template refuses."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        return sandbox.plain(JinjaWriting("chat_template.jinja", jinja, special), messages)
    except DataError:
        return None


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path) -> list[str]:
    try:
        content = read_object(folder / "tokenizer.json", _MOST)
        return [str(token["content"]) for token in content.get("added_tokens", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
