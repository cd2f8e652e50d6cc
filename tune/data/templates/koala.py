"""Koala's prompt: `BEGINNING OF CONVERSATION: USER: x GPT: y</s>USER: …`.

Source: the serving command in EasyLM's docs/koala.md, the authors' own, and FastChat's `koala_v1`, which agree. All of
it is plain text but for the end-of-sequence token, which ends every answer and is trained. Koala knows no system
prompt; a system message stands where `BEGINNING OF CONVERSATION:` does, as in FastChat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tune.data.templates.vicuna import SPOKEN, Vicuna

_OPENING = "BEGINNING OF CONVERSATION:"


@dataclass(frozen=True)
class Koala(Vicuna):
    """Vicuna's turns under another opening, and with another name for who answers."""

    name: str = "koala"
    source: ClassVar[str] = SPOKEN.replace("SYSTEM", _OPENING, 1).replace("ASSISTANT", "GPT")
    default_system: ClassVar[str] = _OPENING
    answerer: ClassVar[str] = "GPT"
