"""From the name in a recipe to a template bound to the tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from tune.data.conversation import BadRowError, Message
from tune.data.encode import encode_prompt
from tune.data.templates import TEMPLATES
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.jinja_writing import GENERATION
from tune.data.templates.segment import Template
from tune.errors import DataError, did_you_mean
from tune.files.foreign import read_plain
from tune.secrets import holds_secret

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST = 1 << 20
"""Bytes of a chat template; those of known models have less than 64 KiB."""

_PROBE = (Message("user", "One?"), Message("assistant", "Two."), Message("user", "Three?"))


def resolve_template(name: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template of this name, bound to the tokenizer and checked against it.

    `auto` is the tokenizer's own chat template if it has one, else alpaca; `tokenizer` is its own; a path that
    ends in `.jinja` is read.

    Raises:
        DataError: an unknown name, a missing file, no chat template, or control tokens that the tokenizer lacks.
    """
    own = _own(tokenizer)
    if name == "auto":
        name = "tokenizer" if own is not None else "alpaca"
    template: Template
    if name == "tokenizer":
        if own is None:
            raise DataError(
                "template tokenizer: the tokenizer has no chat template of its own. "
                f"Set data.template to one of {', '.join(TEMPLATES)}."
            )
        template = JinjaTemplate("tokenizer", own)
    elif name.endswith(".jinja"):
        template = JinjaTemplate(name, _read(name))
    elif name in TEMPLATES:
        template = TEMPLATES[name]
    else:
        known = [*TEMPLATES, "auto", "tokenizer"]
        raise DataError(
            f"template {name!r} is not known. Use {', '.join(known)} or a path to a .jinja file."
            f"{did_you_mean(name, known)}"
        )
    template = template.bind(tokenizer)
    template.check_tokenizer(tokenizer)
    return template


def warns_of_other_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A warning when the tokenizer brings a chat template that writes conversations otherwise than `template` does.

    A base with a chat template was most likely tuned with it. Prompts in another form throw part of that away, and
    whoever serves the base's own template with the adapter sends it prompts that it never saw. Compared are the tokens
    of a prompt with an answer in it, up to where the next one starts.
    """
    own = _own(tokenizer)
    if own is None or own == template.jinja:
        return None
    theirs = JinjaTemplate("tokenizer", own).bind(tokenizer)
    try:
        if encode_prompt(_PROBE, theirs, tokenizer) == encode_prompt(_PROBE, template, tokenizer):
            return None
    except BadRowError:  # one of them needs more than plain turns, so there is nothing to compare
        return None
    return (
        f"template {template.name} writes prompts otherwise than the chat template that the tokenizer brings. A base "
        "that was tuned with its own template learns best from that one: set data.template: tokenizer, unless you mean "
        "to train another."
    )


def _own(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's default chat template; a tokenizer may have several by name. Raises DataError if it is none."""
    chat_template = tokenizer.chat_template
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    if not chat_template:
        return None
    if not isinstance(chat_template, str) or len(chat_template) > LONGEST:
        what = "is longer than 1 MiB" if isinstance(chat_template, str) else "is no text"
        raise DataError(f"template tokenizer: the tokenizer's chat template {what}. Copy it again from the original.")
    return chat_template


def _read(name: str) -> str:
    path = Path(os.path.expanduser(name))
    try:
        text = read_plain(path, LONGEST, links=True).decode("utf-8")
    except FileNotFoundError:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"template {name}: there is no such file.{did_you_mean(path.name, names)}") from None
    except (OSError, ValueError) as error:  # bytes that are no text, or a path that cannot be one
        why = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"template {name}: cannot be read as text ({why}). Give the path of a text file.") from None
    if secret := holds_secret(text.encode(errors="ignore")):
        raise DataError(f"template {name}: holds {secret}, and would be saved with the adapter. Take it out.")
    if not GENERATION.search(text):
        raise DataError(
            f"template {name}: has no {{% generation %}} blocks, so nothing says what is trained. "
            "Put {% generation %} … {% endgeneration %} around the answer and its end token."
        )
    return text
