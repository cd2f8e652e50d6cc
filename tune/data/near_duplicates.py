"""Examples that nearly repeat another: the same text but for a word, a name or a comma.

Two examples are near copies when the Jaccard similarity of their sets of shingles is at least 0.8, and that of their
answers, as sets of two neighbouring tokens, at least a half: several questions about one long text are no copies of
each other.

MinHash finds the candidates: the least value that a random hash takes on a set is the same for two sets with a
probability equal to their similarity. Of 36 such values, two examples must agree in one of twelve bands of three (at
a similarity of 0.8, all but 2 pairs in 10,000 do). Each candidate's similarity is then computed and not estimated.

Sources: Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", chapter 3, for the bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune.data.shingles import CHUNK_TOKENS, Encoding, Ignored, Shingles, chunks, common_in_prompts

if TYPE_CHECKING:
    from tune.data.examples import Examples

SIMILAR = 0.8
"""Jaccard similarity of two examples' shingles from which on they are near copies."""

_SAME_ANSWER = 0.5
_BANDS, _ROWS = 12, 3
# Of 36 values. Far below 0.8 times 36, so that chance loses no near copy and few others are compared in full.
_AGREEING = 20
_PARTNERS = 16
_MOST_COMPARED = 1_000_000

_DRAWN = np.random.default_rng(1997).integers(0, 2**32, size=(2, _BANDS * _ROWS), dtype=np.uint32)
_FACTORS, _FLIPS = _DRAWN[0] | np.uint32(1), _DRAWN[1]


@dataclass(frozen=True, slots=True)
class NearCopies:
    """Near copies within the training data, within the held-out data, and from one to the other; exact ones aside."""

    train: np.ndarray
    """int64 [training examples]: an earlier training example that this one nearly repeats, or -1"""
    eval: np.ndarray
    """int64 [held-out examples]: an earlier held-out example that this one nearly repeats, or -1"""
    shared: np.ndarray
    """int64 [held-out examples]: a training example that this one nearly repeats where none equals it, or -1"""
    complete: bool
    """Whether all candidates were compared; otherwise there may be more near copies than these."""


def find_near_copies(
    train: Examples, evaluated: Examples | None = None, around: np.ndarray | None = None
) -> NearCopies:
    """Find the near copies, in time linear in the tokens where few examples resemble each other.

    It takes about 300 bytes an example besides the examples themselves. Where very many examples resemble each other
    without being near copies, the search ends after a million comparisons and says so.

    Args:
        train: the training examples.
        evaluated: the held-out examples.
        around: hashes of shingles that say nothing of an example, as `template_shingles` finds them.
    """
    parts = [train] if evaluated is None else [train, evaluated]
    always = np.zeros(0, np.uint64) if around is None else np.unique(around)
    ignored = Ignored(always, common_in_prompts(parts))
    search = _Search([_Part.of(part, ignored) for part in parts], ignored)
    nowhere = np.zeros(0, np.int64)
    within, held_out = search.copies(0, 0), nowhere
    shared = nowhere
    if evaluated is not None:
        held_out, shared = search.copies(1, 1), search.copies(1, 0)
    return NearCopies(within, held_out, shared, search.compared <= _MOST_COMPARED)


@dataclass(frozen=True, slots=True)
class _Part:
    """One part's examples, of equal ones only the first, with their MinHash values."""

    examples: Examples
    first: np.ndarray
    """int64 [different examples]: their indices, rising"""
    same: np.ndarray
    """int64 [examples]: where in `first` the example that it equals stands"""
    digests: np.ndarray
    """uint64 [different examples, 2]"""
    least: np.ndarray
    """uint32 [different examples, 36]"""
    empty: np.ndarray
    """bool [different examples]: which have no shingle of their own and are compared with nothing"""

    @classmethod
    def of(cls, examples: Examples, ignored: Ignored) -> _Part:
        digests = examples.digests
        _, first, same = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        first, same = first[order], rank[same.reshape(-1)]
        least = np.empty((len(first), _BANDS * _ROWS), dtype=np.uint32)
        empty = np.ones(len(first), dtype=bool)
        done = 0
        for indices, encodings in chunks(examples, first):
            rows = slice(done, done + len(indices))
            least[rows], empty[rows] = _least(Shingles.of(encodings).without(ignored))
            done += len(indices)
        return cls(examples, first, same, digests[first], least, empty)

    def keys(self, band: int) -> np.ndarray:
        """uint64 [different examples]: equal where all values of a band are equal."""
        keys = np.zeros(len(self.least), dtype=np.uint64)
        for column in range(band * _ROWS, (band + 1) * _ROWS):
            keys *= np.uint64(0x9E3779B97F4A7C15)
            keys += self.least[:, column]
            keys ^= keys >> np.uint64(29)
        return keys

    def encodings(self, rows: np.ndarray) -> list[Encoding]:
        return [self.examples.example(int(index)) for index in self.first[rows]]


def _least(shingles: Shingles) -> tuple[np.ndarray, np.ndarray]:
    """The MinHash values of each example, uint32 [examples, 36], and which examples have no shingle."""
    counts = np.bincount(shingles.owners, minlength=shingles.examples)
    present = counts > 0
    least = np.zeros((shingles.examples, len(_FACTORS)), dtype=np.uint32)
    if present.any():
        starts = np.concatenate([[0], np.cumsum(counts[present])[:-1]])
        upper = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
        values = np.empty_like(upper)
        for column, (factor, flip) in enumerate(zip(_FACTORS, _FLIPS, strict=True)):
            np.bitwise_xor(upper, flip, out=values)
            np.multiply(values, factor, out=values)
            least[present, column] = np.minimum.reduceat(values, starts)
    return least, ~present


class _Search:
    """Candidates of two parts, compared."""

    def __init__(self, parts: Sequence[_Part], ignored: Ignored) -> None:
        self.parts = parts
        self.ignored = ignored
        self.compared = 0

    def copies(self, asked: int, among: int) -> np.ndarray:
        """int64 [examples of part `asked`]: an example of part `among` that each nearly repeats, or -1.

        Within one part only earlier examples count, and an example that equals an earlier one is no near copy too.
        """
        part, others = self.parts[asked], self.parts[among]
        open_ = ~part.empty
        if asked != among:
            open_ &= ~_rows_among(part.digests, others.digests)
        found = np.full(len(part.first), -1, dtype=np.int64)
        tested = np.zeros(0, dtype=np.int64)
        for band in range(_BANDS):
            buckets = _Buckets.of(part, others, band, same=asked == among)
            for step in range(_PARTNERS):
                rows, partners = buckets.pairs(step, open_)
                pairs = rows * len(others.first) + partners
                alike = (part.least[rows] == others.least[partners]).sum(axis=1) >= _AGREEING
                new = alike & ~np.isin(pairs, tested)
                rows, partners, pairs = rows[new], partners[new], pairs[new]
                if not len(rows) or self.compared > _MOST_COMPARED:
                    continue
                tested = np.concatenate([tested, pairs])
                self.compared += len(rows)
                near = self._compare(part, rows, others, partners)
                found[rows[near]] = others.first[partners[near]]
                open_[rows[near]] = False
        if asked != among:
            return np.asarray(found[part.same])
        result = np.full(len(part.same), -1, dtype=np.int64)
        result[part.first] = found
        return result

    def _compare(self, part: _Part, rows: np.ndarray, others: _Part, partners: np.ndarray) -> np.ndarray:
        """bool [pairs]: which are near copies, exactly."""
        tokens = part.examples.lengths[part.first[rows]] + others.examples.lengths[others.first[partners]]
        edges = np.flatnonzero(np.diff(np.cumsum(tokens) // CHUNK_TOKENS)) + 1
        near = [np.zeros(0, dtype=bool)]
        for some in np.split(np.arange(len(rows)), edges):
            if len(some):
                left, right = part.encodings(rows[some]), others.encodings(partners[some])
                shingles = [Shingles.of(side).without(self.ignored) for side in (left, right)]
                alike = _jaccard(*((s.hashes >> np.uint64(24), s.owners) for s in shingles), pairs=len(some))
                answers = _jaccard(*(_answers(side) for side in (left, right)), pairs=len(some))
                near.append((alike >= SIMILAR) & (answers >= _SAME_ANSWER))
        return np.concatenate(near)


@dataclass(frozen=True, slots=True)
class _Buckets:
    """Examples sorted by one band's key: rows of one part, and the places of those they may be copies of."""

    rows: np.ndarray
    """int64 [asked]: a row of the part asked about"""
    starts: np.ndarray
    """int64 [asked]: where in `partners` its bucket starts"""
    eligible: np.ndarray
    """int64 [asked]: how many of the bucket come before it"""
    partners: np.ndarray
    """int64: rows of the other part, or of the same, bucket after bucket"""

    @classmethod
    def of(cls, part: _Part, others: _Part, band: int, *, same: bool) -> _Buckets:
        full = np.flatnonzero(~others.empty)
        keys = others.keys(band)[full]
        order = np.argsort(keys, kind="stable")
        partners, keys = full[order], keys[order]
        rows = partners if same else np.flatnonzero(~part.empty)
        asked = keys if same else part.keys(band)[rows]
        starts = np.searchsorted(keys, asked)
        ends = np.arange(len(keys)) if same else np.searchsorted(keys, asked, side="right")
        several = ends > starts
        return cls(rows[several], starts[several], (ends - starts)[several], partners)

    def pairs(self, step: int, open_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each open row with the first of its bucket, then with the last before it, and so on backwards."""
        chosen = (self.eligible > step) & open_[self.rows]
        places = self.starts[chosen] + (self.eligible[chosen] - step if step else 0)
        return self.rows[chosen], self.partners[places]


def _rows_among(digests: np.ndarray, known: np.ndarray) -> np.ndarray:
    """bool [rows]: which of the digests, uint64 [rows, 2], are among the known ones."""
    pair = np.dtype([("a", np.uint64), ("b", np.uint64)])
    left, right = (np.ascontiguousarray(d).view(pair).reshape(-1) for d in (digests, known))
    return np.isin(left, right)


def _answers(encodings: Sequence[Encoding]) -> tuple[np.ndarray, np.ndarray]:
    """Each trained token with the trained one before it (the first with none), and which example each is of."""
    counts = [int(np.count_nonzero(trained)) for _, trained in encodings]
    tokens = np.concatenate([ids[trained] for ids, trained in encodings]).astype(np.uint64)
    before = np.concatenate([[np.uint64(0)], tokens[:-1] + np.uint64(1)])[: len(tokens)]
    starts = np.cumsum(counts) - counts
    before[starts[starts < len(tokens)]] = 0
    return (before << np.uint64(20)) | tokens, np.repeat(np.arange(len(encodings)), counts)


def _jaccard(left: tuple[np.ndarray, np.ndarray], right: tuple[np.ndarray, np.ndarray], *, pairs: int) -> np.ndarray:
    """float64 [pairs]: common elements over all elements of the left and the right set of each pair.

    Elements are below 2^40 and stand under their pair's number, so that one sort keeps all sets apart.
    """
    shift = np.uint64(40)
    a, b = (np.unique(elements | (owners.astype(np.uint64) << shift)) for elements, owners in (left, right))
    sizes = [np.bincount((s >> shift).astype(np.int64), minlength=pairs) for s in (a, b)]
    both = np.intersect1d(a, b, assume_unique=True)
    common = np.bincount((both >> shift).astype(np.int64), minlength=pairs)
    return np.asarray(common / np.maximum(sizes[0] + sizes[1] - common, 1))
