"""Which examples are held out, and which are equal: decided by what an example says, not by where it stands.

The digest of each example is mixed with the seed, and the result read as a number from 0 to 1. Those below the
fraction are held out. So no row's fate depends on another's: adding rows moves none, and equal examples fall on one
side. All of it is done on digests, whatever the examples' length.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tune.data.examples import Examples


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples | None]:
    """The examples to train on and those held out, None when the fraction picks none.

    A training part is never empty: where every number is below the fraction, the example of the highest one, and
    those equal to it, are trained on.
    """
    drawn = _drawn(examples.digests, seed)
    chosen = (drawn < fraction) & (drawn < drawn.max())
    if not chosen.any():
        return examples, None
    return examples.select(np.flatnonzero(~chosen)), examples.select(np.flatnonzero(chosen))


def _drawn(digests: np.ndarray, seed: int) -> np.ndarray:
    """A number from 0 to below 1 for each digest, another one for each seed.

    The mixing is splitmix64's finalizer (Steele, Lea, Flood 2014), twice: every bit of seed and digest moves every
    bit of the result, and equal digests stay equal.
    """
    salt = np.frombuffer(hashlib.sha256(str(seed).encode()).digest()[:8], dtype="<u8")
    return (_mixed(_mixed(digests[:, 0] ^ salt) ^ digests[:, 1]) >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


def repeated(digests: np.ndarray) -> int:
    """How many of some examples an earlier one of them equals."""
    ordered = digests[np.lexsort(digests.T)]
    return int((ordered[1:] == ordered[:-1]).all(axis=1).sum())


def shared(digests: np.ndarray, others: np.ndarray) -> int:
    """How many of some examples are among the others as well."""
    # Few are held out and many trained on: one number of each is looked up, and the whole digest of what is found.
    near = np.flatnonzero(np.isin(others[:, 0], digests[:, 0]))
    known = {tuple(digest) for digest in others[near].tolist()}
    return sum(tuple(digest) in known for digest in digests[np.isin(digests[:, 0], others[near, 0])].tolist())
