"""The prompts that a proof runs: some of the run's examples, as many as fit a bounded number of positions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

_POSITIONS = 1024
"""At most this many positions in one batch, padding included: bounds the time and the memory of a proof."""
_LONGEST = 256


@dataclass(frozen=True, slots=True)
class Prompt:
    """One example, cut at 256 tokens."""

    ids: np.ndarray
    """int64 [tokens]"""
    trained: np.ndarray
    """bool [tokens]: the tokens that training learned to predict"""

    @property
    def fingerprint(self) -> str:
        """A SHA-256 over the ids."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


def choose_prompts(examples: Iterable[dict[str, Any]]) -> list[Prompt]:
    """Return prompts of the examples that a run remembers, in their order."""
    chosen: list[Prompt] = []
    for example in examples:
        ids = np.array(example["ids"][:_LONGEST], dtype=np.int64)
        prompt = Prompt(ids, np.array(example["trained"][:_LONGEST], dtype=bool))
        width = max(len(other.ids) for other in (*chosen, prompt))
        if not chosen or width * (len(chosen) + 1) <= _POSITIONS:
            chosen.append(prompt)
    return chosen
