"""The patterns of adapter_config.json, which are regular expressions that PEFT matches against every module's name.

A few characters can keep a regular expression busy for years: `(a+)+$` tries every way of dividing a name. So a
pattern is taken only if it is written plainly, without repetition of a group, and if the ways that it can match, an
upper bound counted from its repetitions and alternatives, are few. Names and the patterns that PEFT's users write
(`.*\\.layers\\.\\d+\\.self_attn\\.(q|v)_proj`) stay far below.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,255}")
"""The name of a module or parameter, or the end of one."""

MOST_WAYS = 200_000
"""Of all patterns of a file together."""

_LONGEST = 1024
_WHOLE_NAME, _DIGITS = 128, 4
"""In how many ways a repetition divides a name, and a run of digits in one."""
_PIECE = re.compile(
    r"(?P<open>\((?:\?[:=!])?)|(?P<close>\)\??)|(?P<bar>\|)|[\^$]|"
    r"(?P<one>\\d|\[0-9\]|\\[wsWSD.\-_/]|\[\^?[\w.\- ]{1,64}\]|[\w\- ]|\.)(?P<times>[*+?]\??|\{\d{1,2}(?:,\d{0,2})?\})?"
)


def ways(pattern: str) -> float:
    """Return a bound on the ways in which a pattern can match a name; infinity for one that is not taken."""
    if NAME.fullmatch(pattern):
        return 1
    if len(pattern) > _LONGEST:
        return float("inf")
    found, at = 1.0, 0
    alternatives = [1]
    while at < len(pattern):
        piece = _PIECE.match(pattern, at)
        if piece is None:
            return float("inf")
        at = piece.end()
        if piece["open"]:
            alternatives.append(1)
        elif piece["close"] and len(alternatives) == 1:
            return float("inf")
        elif piece["close"]:
            found *= alternatives.pop() + piece["close"].endswith("?")
        elif piece["bar"]:
            alternatives[-1] += 1
        elif piece["times"]:
            optional = piece["times"] in ("?", "??")
            found *= 2 if optional else _DIGITS if piece["one"] in ("\\d", "[0-9]") else _WHOLE_NAME
    if len(alternatives) > 1 or not _compiles(pattern):
        return float("inf")
    return found * alternatives[0]


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, OverflowError):
        return False
    return True


class Ranks:
    """The ranks that adapter_config.json gives, by the full name of a module or parameter.

    PEFT's rule is the first pattern that matches the end of a name. Names are looked up, and only what is more than
    a name is matched, so that thousands of them take no time.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._rank: int = int(config["r"])
        self._named: dict[str, tuple[int, int]] = {}
        self._patterns: list[tuple[int, re.Pattern[str], int]] = []
        for place, (pattern, rank) in enumerate((config.get("rank_pattern") or {}).items()):
            plain = re.sub(r"\\([.-])", r"\1", pattern)
            if NAME.fullmatch(plain):
                self._named.setdefault(plain, (place, rank))
            else:
                self._patterns.append((place, re.compile(rf"(.*\.)?({pattern})$"), rank))

    def of(self, name: str) -> int:
        """Return the rank of one."""
        ends = [name, *(name[dot.end() :] for dot in re.finditer(r"\.", name))]
        found = [self._named[end] for end in ends if end in self._named]
        first = min(found, default=None)
        for place, pattern, rank in self._patterns:
            if first is not None and first[0] < place:
                break
            if pattern.match(name):
                return rank
        return self._rank if first is None else first[1]


def few_ways(patterns: Iterable[str]) -> bool:
    """Whether all of them together are matched in no time."""
    return sum(found for pattern in patterns if (found := ways(pattern)) > 1) <= MOST_WAYS
