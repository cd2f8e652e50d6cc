"""What is known of a source's rows once they have been read: counts, and the first examples of what is wrong.

However many rows are wrong in a way, three of them are remembered: those that a message shows.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tune.data.sources import Place

SHOWN = 3
"""So many rows of a kind are shown."""


@dataclass(slots=True)
class Tally:
    """How many rows are wrong in one way, and the first of them in the order of the source, each with a reason."""

    count: int = 0
    first: list[tuple[Place, str]] = field(default_factory=list)

    def add(self, place: Place, reason: str = "") -> None:
        """Count a row. Rows need not come in order."""
        self.count += 1
        if len(self.first) < SHOWN or place < self.first[-1][0]:
            insort(self.first, (place, reason), key=lambda told: told[0])
            del self.first[SHOWN:]


@dataclass(slots=True)
class Facts:
    """One source. Tokens are those of the examples kept."""

    format: str
    """The format that the rows were read as."""
    rows: int = 0
    """Rows read, bad ones included."""
    bad: Tally = field(default_factory=Tally)
    long: Tally = field(default_factory=Tally)
    """Dropped, or to be refused, for their length."""
    untrained: Tally = field(default_factory=Tally)
    secrets: Tally = field(default_factory=Tally)
    """Rows in which a text is shaped like a token or key."""
    mended: dict[str, int] = field(default_factory=dict)
    """What was changed in the order of turns, in words, and in how many conversations."""
    cut_away: int = 0
    """How many of `untrained` had something to train on beyond data.max_length."""
    examples: int = 0
    tokens: int = 0
    trained: int = 0
    truncated: int = 0
    duplicates: int = 0
    largest_id: int = 0
    length_p50: int = 0
    """Of the prompts as written, before any cut."""
    length_p95: int = 0
    length_max: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `of_json` makes the same again."""
        return asdict(self)

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Facts:
        """The facts that were written down. Raises TypeError, ValueError or KeyError where that is not what it is."""
        tallies = {
            name: Tally(
                int(values[name]["count"]),
                [(Place(int(file), int(number)), str(reason)) for (file, number), reason in values[name]["first"]],
            )
            for name in ("bad", "long", "untrained", "secrets")
        }
        return cls(**{**values, **tallies})
