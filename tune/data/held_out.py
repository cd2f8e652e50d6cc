"""Which examples are held out: decided by what an example says, not by where it stands.

Each example is hashed with the seed, and its hash read as a number from 0 to 1. Those below the fraction are
held out. So no row's fate depends on another's: adding rows moves none, and equal examples fall on one side.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tune.data.encode import Examples


def digests(examples: Examples, salt: bytes = b"") -> list[bytes]:
    """16 bytes for each example's ids: equal examples have equal digests, wherever they stand."""
    raw, width = examples.ids.tobytes(), examples.ids.itemsize
    edges = (examples.offsets * width).tolist()
    return [hashlib.blake2b(raw[start:end], digest_size=16, key=salt).digest() for start, end in pairwise(edges)]


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples | None]:
    """The examples to train on and those held out, None when the fraction picks none.

    A training part is never empty: where every hash is below the fraction, the example of the highest hash, and
    those equal to it, are trained on.
    """
    drawn = np.array([int.from_bytes(d[:6], "big") / 2**48 for d in digests(examples, salt=str(seed).encode())])
    chosen = (drawn < fraction) & (drawn < drawn.max())
    if not chosen.any():
        return examples, None
    return examples.select(np.flatnonzero(~chosen)), examples.select(np.flatnonzero(chosen))
