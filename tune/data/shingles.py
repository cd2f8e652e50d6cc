"""Examples as sets of shingles: runs of five tokens, each as a 64-bit hash.

What a template writes around every text says nothing of an example. Shingles of the template's own words are left
out, and so are those that stand in the prompts of more than a twentieth of the examples (and of a hundred): a system
prompt, an instruction that every row repeats. What is trained on is never left out for being common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.encode import Encoder
from tune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tune.data.examples import Examples
    from tune.data.templates.segment import Template

WIDTH = 5
"""Tokens in a shingle."""

CHUNK_TOKENS = 1 << 18
"""Tokens that are looked at together, unless one example has more: what fits a processor's cache."""

_COMMON_SHARE, _COMMON_LEAST, _SAMPLED = 0.05, 100, 20_000
_NOTHING = np.zeros(0, np.uint64)

Encoding = tuple[np.ndarray, np.ndarray]
"""The ids and the mask of one example."""


@dataclass(frozen=True, slots=True)
class Shingles:
    """The shingles of some examples, in their order; one that an example holds twice is here twice."""

    hashes: np.ndarray
    """uint64 [shingles]"""
    owners: np.ndarray
    """int64 [shingles], rising: which of the examples a shingle is of"""
    trained: np.ndarray
    """bool [shingles]: whether a token of it is trained on"""
    examples: int

    @classmethod
    def of(cls, encodings: Sequence[Encoding]) -> Shingles:
        """All shingles of these examples; one shorter than a shingle has none."""
        lengths = np.array([len(ids) for ids, _ in encodings], dtype=np.int64)
        ids = np.concatenate([ids for ids, _ in encodings])
        mask = np.concatenate([trained for _, trained in encodings])
        count = max(len(ids) - WIDTH + 1, 0)
        whole = np.ones(count, dtype=bool)
        ends = np.cumsum(lengths)
        for back in range(1, WIDTH):
            across = ends - back
            whole[across[(across >= 0) & (across < count)]] = False
        trained = np.zeros(count, dtype=bool)
        for offset in range(WIDTH):
            trained |= mask[offset : offset + count]
        owners = np.repeat(np.arange(len(lengths)), lengths)[:count]
        return cls(_hashes(ids, count)[whole], owners[whole], trained[whole], len(lengths))

    def without(self, ignored: Ignored) -> Shingles:
        """Those that say something of their example."""
        kept = ~(_among(self.hashes, ignored.anywhere) | (_among(self.hashes, ignored.in_prompts) & ~self.trained))
        return Shingles(self.hashes[kept], self.owners[kept], self.trained[kept], self.examples)


@dataclass(frozen=True, slots=True)
class Ignored:
    """Shingles that say nothing of an example: sorted hashes."""

    anywhere: np.ndarray
    in_prompts: np.ndarray


def _hashes(ids: np.ndarray, count: int) -> np.ndarray:
    tokens = ids.astype(np.uint64) + np.uint64(1)
    hashed = np.zeros(count, dtype=np.uint64)
    for offset in range(WIDTH):
        hashed *= np.uint64(0x9E3779B97F4A7C15)
        hashed += tokens[offset : offset + count]
    # The finish of splitmix64: every bit of the sum reaches the upper half, which MinHash takes.
    hashed ^= hashed >> np.uint64(30)
    hashed *= np.uint64(0xBF58476D1CE4E5B9)
    hashed ^= hashed >> np.uint64(27)
    hashed *= np.uint64(0x94D049BB133111EB)
    hashed ^= hashed >> np.uint64(31)
    return hashed


def _among(hashes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Which hashes are among the sorted `known`."""
    if not len(known):
        return np.zeros(len(hashes), dtype=bool)
    # A table of 16 bits answers for most of them, at a twentieth of a search's time.
    table = np.zeros(1 << 16, dtype=bool)
    table[known >> np.uint64(48)] = True
    found = table[hashes >> np.uint64(48)]
    maybe = hashes[found]
    found[found] = known[np.minimum(np.searchsorted(known, maybe), len(known) - 1)] == maybe
    return np.asarray(found)


def chunks(examples: Examples, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, list[Encoding]]]:
    """The examples of rising indices `chosen`, some at a time, with the indices."""
    lengths = examples.lengths[chosen]
    # A chunk holds the examples that end within one stretch of so many tokens.
    edges = np.flatnonzero(np.diff(np.cumsum(lengths) // CHUNK_TOKENS)) + 1
    for indices in np.split(chosen, edges):
        if len(indices):
            yield indices, [examples.example(int(index)) for index in indices]


def common_in_prompts(parts: Sequence[Examples]) -> np.ndarray:
    """Sorted hashes of the shingles that the prompts of many examples hold, found in a sample where there are many."""
    total = sum(len(part) for part in parts)
    step = -(-total // _SAMPLED)
    if total <= _COMMON_LEAST:
        return _NOTHING
    seen: list[np.ndarray] = []
    sampled = 0
    for part in parts:
        for indices, encodings in chunks(part, np.arange(0, len(part), step)):
            shingles = Shingles.of(encodings)
            prompts = ~shingles.trained
            hashes, owners = shingles.hashes[prompts], shingles.owners[prompts]
            order = np.lexsort((hashes, owners))
            hashes, owners = hashes[order], owners[order]
            again = (np.diff(hashes, prepend=~hashes[:1]) == 0) & (np.diff(owners, prepend=-1) == 0)
            seen.append(hashes[~again])
            sampled += len(indices)
    hashes, counts = np.unique(np.concatenate(seen), return_counts=True)
    return np.asarray(hashes[counts > max(_COMMON_LEAST / step, _COMMON_SHARE * sampled)])


def template_shingles(template: Template, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> np.ndarray:
    """Sorted hashes of what `template` writes whatever the text: the shingles of prompts that have no text in common.

    `system` is the recipe's system prompt, which stands in every prompt too.
    """
    encoder = Encoder(tokenizer)
    found = [_NOTHING]
    for openings in ((None, None), ("Maple", "seven"), (system, system)):
        for extra in ((None, None), ("Stone", "under")):
            probes = [_probe(n, opening, given) for n, (opening, given) in enumerate(zip(openings, extra, strict=True))]
            try:
                encoded = encoder.encode([template.segments(probe) for probe in probes])
            except DataError:
                # A template that cannot write such a prompt writes none for a row either.
                continue
            if any(isinstance(prompt, BadRowError) for prompt in encoded):
                continue
            hashes = [
                Shingles.of([(np.array(prompt.ids), np.array(prompt.trained, dtype=bool))]).hashes
                for prompt in encoded
                if not isinstance(prompt, BadRowError)
            ]
            found.append(np.intersect1d(hashes[0], hashes[1]))
    return np.unique(np.concatenate(found))


def _probe(number: int, system: str | None, given: str | None) -> Conversation:
    """A dialogue of two questions whose words are in no other."""
    asked, said, again, more = (("River", "Quiz", "Bread", "Lamp"), ("blue", "forty", "why", "Zebra"))[number]
    opening = [Message("system", system)] if system else []
    turns = [Message("user", asked, input=given), Message("assistant", said)]
    return Conversation((*opening, *turns, Message("user", again, input=given), Message("assistant", more)))
