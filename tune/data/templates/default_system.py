"""The system prompt that trained, carried by a chat template.

`data.system` gives a system prompt to every example without one, and the template that was trained knows nothing of
it. Saved as it is, it would write another prompt than the trained one for whoever sends no system message. So the
saved template begins with a preamble that puts the trained system message first where messages bring none.

The prompt stands there as a string literal. Templates are read by more programs than jinja itself, so it uses only the
plainest escapes, and no pair of characters that opens or closes a tag: such pairs are looked for with regular
expressions, in strings or not. The preamble ends in a newline, which chat templates drop after a tag (`trim_blocks`),
so that what follows is read as if it stood alone, leading white space included.
"""

from __future__ import annotations

import re

_BEFORE = """\
{#- The system prompt that trained, for messages that bring none. #}
{%- if not messages or messages[0]['role'] != 'system' %}
{%- set messages = [{'role': 'system', 'content': """
_AFTER = """}] + messages %}
{%- endif %}
"""
_JOINT = " ~ "
_LITERAL = r"'(?:[^'\\]|\\.)*'"
_PREAMBLE = re.compile(
    re.escape(_BEFORE) + rf"({_LITERAL}(?:{re.escape(_JOINT)}{_LITERAL})*)" + re.escape(_AFTER), re.DOTALL
)
_TAG_HALVES = re.compile(r"(?<=\{)(?=[{%#])|(?<=[}%#])(?=\})")
_ESCAPES = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_ESCAPED = {escaped: char for char, escaped in _ESCAPES.items()}


def with_system(jinja: str, system: str | None) -> str:
    """Return a chat template that writes `system` where the messages do not open with a system message.

    A template that got such a preamble before gets the new one instead; without a `system` it is returned as it is.
    """
    if not system:
        return jinja
    return _BEFORE + _literal(system) + _AFTER + split_system(jinja)[1]


def split_system(jinja: str) -> tuple[str | None, str]:
    """Return the system prompt that `with_system` put into a chat template, None without one, and the rest of it."""
    preamble = _PREAMBLE.match(jinja)
    if preamble is None:
        return None, jinja
    pieces = re.findall(_LITERAL, preamble[1], re.DOTALL)
    escaped = "".join(piece[1:-1] for piece in pieces)
    return re.sub(r"\\.", lambda match: _ESCAPED.get(match[0], match[0]), escaped), jinja[preamble.end() :]


def _literal(text: str) -> str:
    """A jinja expression of string literals for `text`, in pieces between which the halves of a tag fall apart."""
    escaped = "".join(_ESCAPES.get(char, char) for char in text)
    return _JOINT.join(f"'{piece}'" for piece in _TAG_HALVES.split(escaped))
