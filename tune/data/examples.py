"""Encoded examples: the tokens of each source end to end, and an index over them.

The tokens lie in files that are mapped into memory, so that how many there are is the disk's affair. An example is
known by two digests of its content, which tell equal examples, what is held out and what was trained on without a
look at the tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

Where = Callable[[int, int], str]

ROW = np.dtype(
    [
        ("end", "<i8"),  # where the row's tokens end among those of its source; they begin where the last row's ended
        ("digest", "<u8", (2,)),  # of the ids
        ("content", "<u8", (2,)),  # of the ids and of what is trained
        ("number", "<i8"),  # with `file`, the place that the row was read from
        ("file", "<i4"),
        ("trained", "<i4"),  # how many of the tokens
        ("cut", "?"),  # at data.max_length
        ("ended", "?"),  # whether a special token is trained on
    ],
    align=True,
)
"""What is known of each example beside its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """The encoded examples of one source end to end, without padding, as they lie on the disk or in memory.

    `trained[t]` says that the model must learn to predict token t; the first token of an example never is, since
    nothing predicts it.
    """

    ids: np.ndarray
    """int32 [tokens]"""
    trained: np.ndarray
    """bool [tokens]"""
    rows: np.ndarray
    """ROW [examples]"""
    largest_id: int
    where: Where
    """How messages name the row at (file, number)."""


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """An index over the stored examples of several sources. What it holds grows with the examples, not the tokens."""

    stored: tuple[Stored, ...]
    part: np.ndarray
    """int32 [examples]: which of `stored` holds an example"""
    row: np.ndarray
    """int32 [examples]: and which of its rows it is"""
    source: np.ndarray
    """int32 [examples]: which source of the recipe's list an example is from"""
    lengths: np.ndarray
    """int64 [examples]: tokens in each example"""
    trained_counts: np.ndarray
    """int64 [examples]: trained tokens in each example"""
    cut: np.ndarray
    """bool [examples]: which were cut at data.max_length"""
    digests: np.ndarray
    """uint64 [examples, 2]: of the ids; equal examples have equal digests, wherever they stand"""

    @classmethod
    def over(cls, stored: Sequence[Stored], sources: Sequence[int]) -> Examples:
        """All examples of some sources, one after the other; `sources` are their numbers in the recipe's list."""
        counts = [len(part.rows) for part in stored]

        def together(parts: list[np.ndarray], dtype: type) -> np.ndarray:
            return parts[0].astype(dtype) if len(parts) == 1 else np.concatenate(parts, dtype=dtype, casting="unsafe")

        return cls(
            tuple(stored),
            np.repeat(np.arange(len(stored), dtype=np.int32), counts),
            together([np.arange(count, dtype=np.int32) for count in counts], np.int32),
            np.repeat(np.array(sources, dtype=np.int32), counts),
            together([np.diff(part.rows["end"], prepend=0) for part in stored], np.int64),
            together([part.rows["trained"] for part in stored], np.int64),
            together([part.rows["cut"] for part in stored], np.bool_),
            together([part.rows["digest"] for part in stored], np.uint64),
        )

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        trained: Sequence[Sequence[bool]],
        *,
        source: Sequence[int] | None = None,
        cut: Sequence[bool] | None = None,
    ) -> Examples:
        """Examples that are given in memory: the ids and the mask of each. Their rows are named `row 0` and so on."""
        rows = np.zeros(len(ids), dtype=ROW)
        masks = [np.asarray(mask, dtype=np.bool_) for mask in trained]
        tokens = [np.asarray(example, dtype=np.int32) for example in ids]
        rows["end"] = np.cumsum([len(example) for example in tokens])
        for number, (example, mask) in enumerate(zip(tokens, masks, strict=True)):
            assert len(example) == len(mask)
            rows[number]["digest"], rows[number]["content"] = np.frombuffer(
                b"".join(digests(example.tobytes(), mask.tobytes())), dtype="<u8"
            ).reshape(2, 2)
        rows["number"] = np.arange(len(ids))
        rows["trained"] = [int(mask.sum()) for mask in masks]
        rows["cut"] = cut if cut is not None else False
        flat, marks = np.concatenate([np.empty(0, np.int32), *tokens]), np.concatenate([np.empty(0, np.bool_), *masks])
        stored = Stored(flat, marks, rows, int(flat.max(initial=0)), lambda file, number: f"row {number}")
        made = cls.over([stored], [0])
        return made if source is None else replace(made, source=np.asarray(source, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.row)

    @property
    def tokens(self) -> int:
        """Tokens of all examples together."""
        return int(self.lengths.sum())

    @property
    def largest_id(self) -> int:
        """The largest token id in the sources of these examples."""
        return max((part.largest_id for part in self.stored), default=0)

    def example(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The ids (int32) and the mask (bool) of one example, as views that cannot be written to."""
        stored = self.stored[self.part[index]]
        end = int(stored.rows["end"][self.row[index]])
        start = end - int(self.lengths[index])
        return stored.ids[start:end], stored.trained[start:end]

    def where(self, index: int) -> str:
        """The row that an example was read from, as messages name it."""
        stored = self.stored[self.part[index]]
        row = stored.rows[self.row[index]]
        return str(stored.where(int(row["file"]), int(row["number"])))

    def column(self, name: str) -> np.ndarray:
        """One field of ROW for every example."""
        found = np.empty((len(self), *ROW[name].shape), dtype=ROW[name].base)
        for number, stored in enumerate(self.stored):
            members = np.flatnonzero(self.part == number)
            found[members] = stored.rows[name][self.row[members]]
        return found

    def select(self, indices: np.ndarray) -> Examples:
        """The examples of these indices, in this order. No token is copied."""
        return Examples(
            self.stored,
            self.part[indices],
            self.row[indices],
            self.source[indices],
            self.lengths[indices],
            self.trained_counts[indices],
            self.cut[indices],
            self.digests[indices],
        )


def digests(ids: bytes, trained: bytes | bytearray) -> tuple[bytes, bytes]:
    """16 bytes of an example's ids (int32, little endian), and 16 of its ids and its mask (a byte a token)."""
    hashed = hashlib.blake2b(ids, digest_size=16)
    of_ids = hashed.digest()
    hashed.update(trained)
    return of_ids, hashed.digest()
