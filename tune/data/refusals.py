"""What is wrong with rows, said together: the first three of a kind, their number, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from tune.data.reading import SourceData
from tune.errors import DataError


def refuse_bad(sources: Sequence[SourceData]) -> None:
    """Raise DataError when a row cannot be used."""
    bad = [row for source in sources for row in sorted(source.bad, key=lambda row: row.position)]
    if bad:
        rows = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
        raise DataError([*map(str, bad[:3]), f"{rows} cannot be used. Mend the data, or set data.on_bad: drop."])


def refuse_untrained(sources: Sequence[SourceData], max_length: int) -> None:
    """Raise DataError when nothing of a row is trained on."""
    untrained = [where for source in sources for where in source.untrained]
    if untrained:
        reason = f"nothing of it is trained on (is the prompt alone longer than data.max_length {max_length}?)"
        raise DataError(
            [
                *(f"{where}: {reason}" for where in untrained[:3]),
                f"rows with nothing to train on: {len(untrained)}. Raise data.max_length, or set data.on_bad: drop.",
            ]
        )


def refuse_long(sources: Sequence[SourceData], max_length: int) -> None:
    """Raise DataError when a row is longer than `max_length` tokens."""
    long = [where for source in sources for where in source.long]
    if long:
        raise DataError(
            [
                *(f"{where}: is longer than data.max_length ({max_length} tokens)" for where in long[:3]),
                f"rows that are too long: {len(long)}. Raise data.max_length, or set data.on_long: truncate or drop.",
            ]
        )


def refuse_empty(key: str, sources: Sequence[SourceData], max_length: int) -> None:
    """Raise DataError when no row of `key`'s sources is left, with what became of them."""
    if any(source.kept for source in sources):
        return
    long = sum(len(source.long) for source in sources)
    prompt_alone = sum(source.cut_away for source in sources)
    untrained = sum(len(source.untrained) for source in sources) - prompt_alone
    bad = sum(len(source.bad) for source in sources)
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
        longest = max(max(source.lengths, default=0) for source in sources)
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
