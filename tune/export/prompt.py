"""How a run's prompts are written, shown on a question made up for the purpose and never on a row of the data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUESTION = "What is the capital of France?"
ANSWER = "Paris."


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
        jinja = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
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
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    try:
        rendered, _ = render_jinja_template(conversations=[messages], chat_template=jinja, **special)
    except (TemplateError, TypeError, ValueError):
        return None
    return str(rendered[0])


def _content(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _added_tokens(folder: Path) -> list[str]:
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return [str(token["content"]) for token in content.get("added_tokens", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
