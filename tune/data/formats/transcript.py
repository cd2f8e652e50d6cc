"""Transcripts: a whole conversation in one text, each turn behind `### Human:` or `### Assistant:`.

Guanaco's copy of OpenAssistant's conversations is written so. A mark counts wherever it stands, since there it follows
the words before without a line break or even a space; white space around a turn is dropped. Text before the first mark
is a system message.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tune.data.conversation import BadRowError, Message, Role

_MARK = re.compile(r"(?<!#)### (Human|User|Assistant|System):")
_ROLES: dict[str, Role] = {"Human": "user", "User": "user", "Assistant": "assistant", "System": "system"}


def is_transcript(text: str) -> bool:
    """Whether a text begins with someone's turn, or holds a question's mark and an answer's after it."""
    if _begins(text):
        return True
    first = _MARK.search(text) if "### Assistant:" in text else None
    return first is not None and _ROLES[first[1]] == "user"


def are_transcripts(texts: Iterable[object], *, from_the_start: bool = False) -> bool:
    """Whether most of some texts are transcripts, with nothing before the first mark if `from_the_start`.

    Values that are no text do not count.
    """
    told = _begins if from_the_start else is_transcript
    found = [told(text) for text in texts if isinstance(text, str)]
    return sum(found) * 2 > len(found)


def _begins(text: str) -> bool:
    return _MARK.match(text.lstrip()) is not None


def read_transcript(text: str) -> list[Message]:
    """The turns of a transcript; the last is an empty answer where it ends in `### Assistant:`.

    Raises:
        BadRowError: nobody speaks in it.
    """
    before, *turns = _MARK.split(text)
    if not turns:
        raise BadRowError("is no transcript like the other rows: it has no '### Human:'")
    opening = [Message("system", before.strip())] if before.strip() else []
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [*opening, *(Message(_ROLES[speaker], said.strip()) for speaker, said in pairs)]
