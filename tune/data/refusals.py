"""What is wrong with rows, said together: the first three of a kind, their number, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tune.data.facts import SHOWN, Tally
from tune.data.prepare import SourceData
from tune.errors import DataError


def refuse_bad(sources: Sequence[SourceData]) -> None:
    """Raise DataError when a row cannot be used."""
    shown, count = _first((source, source.known.bad) for source in sources)
    if count:
        rows = "1 row" if count == 1 else f"{count} rows"
        raise DataError(
            [
                *(f"{where}: {reason}" for where, reason in shown),
                f"{rows} cannot be used. Mend the data, or set data.on_bad: drop.",
            ]
        )


def refuse_untrained(sources: Sequence[SourceData], max_length: int) -> None:
    """Raise DataError when nothing of a row is trained on."""
    shown, count = _first((source, source.known.untrained) for source in sources)
    if count:
        cut_away = sum(source.known.cut_away for source in sources)
        long = f"the prompt alone is longer than data.max_length {max_length}"
        why = long if cut_away == count else f"no answer counts, or {long}" if cut_away else "no answer of it counts"
        reason = f"nothing of it is trained on ({why})"
        raise DataError(
            [
                *(f"{where}: {reason}" for where, _ in shown),
                f"rows with nothing to train on: {count}. "
                f"{'Raise data.max_length' if cut_away else 'Mend the data'}, or set data.on_bad: drop.",
            ]
        )


def refuse_long(sources: Sequence[SourceData], max_length: int) -> None:
    """Raise DataError when a row is longer than `max_length` tokens."""
    shown, count = _first((source, source.known.long) for source in sources)
    if count:
        raise DataError(
            [
                *(f"{where}: is longer than data.max_length ({max_length} tokens)" for where, _ in shown),
                f"rows that are too long: {count}. Raise data.max_length, or set data.on_long: truncate or drop.",
            ]
        )


def _first(tallies: Iterable[tuple[SourceData, Tally]]) -> tuple[list[tuple[str, str]], int]:
    """The first rows of some sources' tallies, where each is and why, and how many there are."""
    shown, count = [], 0
    for source, tally in tallies:
        shown += [(source.where(*place), reason) for place, reason in tally.first]
        count += tally.count
    return shown[:SHOWN], count


def refuse_empty(key: str, sources: Sequence[SourceData], max_length: int) -> None:
    """Raise DataError when no row of `key`'s sources is left, with what became of them."""
    if any(source.known.examples for source in sources):
        return
    facts = [source.known for source in sources]
    long = sum(fact.long.count for fact in facts)
    prompt_alone = sum(fact.cut_away for fact in facts)
    untrained = sum(fact.untrained.count for fact in facts) - prompt_alone
    bad = sum(fact.bad.count for fact in facts)
    reasons = [
        f"{count} {words}"
        for count, words in (
            (long, f"longer than data.max_length {max_length}"),
            (prompt_alone, f"whose prompt alone is longer than data.max_length {max_length}"),
            (untrained, "with nothing to train on"),
            (bad, "that cannot be used"),
        )
        if count
    ]
    remedy = ""
    if long or prompt_alone:
        longest = max(fact.length_max for fact in facts)
        remedy = f" Raise data.max_length; the longest row has {longest} tokens."
    if bad or untrained:
        remedy += " Without data.on_bad: drop, the first of them are shown."
    raise DataError(f"{key}: no row is left (dropped: {', '.join(reasons)}).{remedy}")


def refuse_weightless(key: str, sources: Sequence[SourceData], counts: Sequence[int]) -> None:
    """Raise DataError when a source's weight leaves none of its examples in an epoch.

    Args:
        key: the recipe's, such as data.train.
        sources: in the recipe's order.
        counts: the examples of each that are trained on, held-out ones taken away.
    """
    for source, count in zip(sources, counts, strict=True):
        weight = source.source.weight
        # The very expression that counts an epoch's examples.
        if count and not round(weight * count):
            examples = "its 1 example" if count == 1 else f"its {count} examples"
            raise DataError(
                f"{key}[{source.index}].weight: leaves none of {examples} in an epoch ({weight:g}). "
                f"Write at least {_rounded_up(1 / count)}, or remove {source.source.path}."
            )


def _rounded_up(value: float) -> str:
    """Two digits that are not below `value`."""
    text = f"{value:.2g}"
    return text if float(text) >= value else f"{value * 1.05:.2g}"
