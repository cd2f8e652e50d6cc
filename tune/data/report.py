"""What came of the data: the numbers that `tune check` prints and a run records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source of `data.train` or `data.eval`. Tokens are those of the examples kept."""

    path: str
    part: Literal["train", "eval"]
    format: str
    """The format that the rows were read as; with auto, the one detected."""
    template: str
    rows: int
    """Rows read, bad ones included."""
    examples: int
    tokens: int
    trained: int
    """Tokens trained on."""
    truncated: int
    """Examples cut at data.max_length."""
    dropped_long: int
    dropped_bad: int
    dropped_untrained: int
    """Rows dropped since no token of theirs would be trained on."""
    duplicates: int
    """Examples whose tokens another example of the same part has as well, counted without the first."""
    length_p50: int
    """Half of the prompts have at most so many tokens as they are written, before the cut at data.max_length."""
    length_p95: int
    length_max: int
    mended: tuple[tuple[str, int], ...] = ()
    """What was changed in the order of turns, in words, and in how many conversations."""
    secrets: int = 0
    """Rows in which a text is shaped like a token or key."""
    first_secret: str = ""
    """The place of the first of them."""
    dropped: tuple[str, ...] = ()
    """The first rows that were dropped for each reason: the place and the reason."""
    barren: tuple[str, ...] = ()
    """Of a source of several files, those that no example came of."""

    @property
    def trained_share(self) -> float:
        """Trained tokens over all tokens."""
        return self.trained / self.tokens if self.tokens else 0.0

    @property
    def truncated_share(self) -> float:
        """Truncated examples over all examples."""
        return self.truncated / self.examples if self.examples else 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """All sources in the recipe's order, those of `data.train` first."""

    sources: tuple[SourceReport, ...]
    train_examples: int
    train_tokens: int
    train_trained: int
    eval_examples: int
    eval_tokens: int
    eval_trained: int
    duplicates: int
    """Training examples that an earlier training example equals, token for token."""
    shared: int
    """Held-out examples that a training example equals, token for token."""
    unended: int
    """Training examples, cut ones aside, in which no special token is trained on."""
    eval_asked: bool
    """Whether the recipe asked for held-out data."""
    max_length: int
    """The recipe's data.max_length, in tokens."""
    cached: int = field(default=0, compare=False)
    """Sources that were found in the cache, and not encoded again."""
    cache_problem: str | None = field(default=None, compare=False)
    """Why the encoded data could not be kept for the next start, if it could not."""
    template_notes: tuple[str, ...] = ()
    """Which templates write prompts otherwise than the one that the tokenizer brings, in words."""

    def warnings(self) -> list[str]:
        """What looks wrong, in words, the remedy included."""
        found = []
        for source in self.sources:
            where = f"{source.path} ({source.part})"
            if source.truncated_share > 0.2:
                enough = max(source.length_p95, self.max_length)
                found.append(
                    f"{where}: {source.truncated_share:.0%} of the examples are cut at data.max_length "
                    f"({self.max_length}). data.max_length={enough} would keep 95% whole."
                )
            if source.tokens and source.trained_share < 0.05:
                found.append(
                    f"{where}: only {source.trained_share:.1%} of the tokens are trained on. "
                    "Look at `tune preview`: are the answers where they should be?"
                )
            dropped = source.dropped_bad + source.dropped_untrained + source.dropped_long
            if dropped:
                found.append(f"{where}: {dropped} of {source.rows} rows are dropped.")
            if source.barren:
                more = f" and {len(source.barren) - 3} more" if len(source.barren) > 3 else ""
                found.append(
                    f"{where}: not one example came of {', '.join(source.barren[:3])}{more}. All files of a source are "
                    f"read as {source.format}: make those a source of their own, with their own format."
                )
            found += [f"{where}: in {count} of {source.rows} rows, {words}." for words, count in source.mended]
            if source.secrets:
                found.append(
                    f"{where}: {source.secrets} of {source.rows} rows hold a text that is shaped like a token or key "
                    f"(first: {source.first_secret}). Whoever has the adapter may draw it out. Take it out, unless it "
                    "is made up."
                )
        found += self.template_notes
        if self.duplicates:
            found.append(f"{self.duplicates} of {self.train_examples} training examples repeat an earlier one exactly.")
        if self.shared:
            found.append(
                f"{self.shared} of {self.eval_examples} held-out examples are in the training data as well: "
                "the held-out loss will look better than it is. Take them out of one of the two."
            )
        if self.unended:
            found.append(
                f"{'1 training example ends' if self.unended == 1 else f'{self.unended} training examples end'} "
                "without an end-of-turn token that is trained: the model may not "
                "learn to stop. Put the end token inside the template's {% generation %} block."
            )
        if self.eval_asked and not self.eval_examples:
            found.append("data.eval: the fraction is too small for these rows; nothing is held out.")
        if self.cache_problem is not None:
            found.append(
                f"the encoded data is not kept ({self.cache_problem}), so that the next start encodes it again. "
                "Set TUNE_CACHE to a folder that can be written to."
            )
        return found


def percentiles(lengths: Sequence[int]) -> tuple[int, int, int]:
    """Median, 95th percentile and maximum of some lengths; zeros without any.

    Each is one of the lengths, and so many of them, or more, are at most as long.
    """
    if not len(lengths):
        return 0, 0, 0
    median, high, longest = np.percentile(np.asarray(lengths), [50, 95, 100], method="inverted_cdf")
    return int(median), int(high), int(longest)
