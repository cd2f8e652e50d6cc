"""The examples of one source as a folder of arrays, written a few thousand at a time and mapped when read.

`ids.npy`, `trained.npy` and `rows.npy` hold what `Stored` does, `facts.json` what was counted on the way, and the size
of each file, by which one that is cut short is known. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from tune.data.examples import ROW, Stored, Where
from tune.data.facts import Facts

FACTS = "facts.json"
_ARRAYS: dict[str, np.dtype[Any]] = {"ids": np.dtype("<i4"), "trained": np.dtype("?"), "rows": ROW}


class UnwritableError(Exception):
    """A place cannot be written to; the message names it and says why."""


class DamagedError(Exception):
    """A folder does not hold what was written there."""


@contextmanager
def writing(place: Path | str) -> Iterator[None]:
    """Turn what the disk refuses into UnwritableError."""
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{place}: {error.strerror or error}") from error


class Writer:
    """Writes a source's examples into a folder; `finish` makes them whole.

    Every method raises UnwritableError when the disk refuses.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._counts = dict.fromkeys(_ARRAYS, 0)

    def __enter__(self) -> Self:
        with writing(self.folder):
            for name in _ARRAYS:
                self._files[name] = (self.folder / f"{name}.npy").open("wb")
                self._write_header(name)
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            # All that counts was flushed and synced by `finish`.
            with suppress(OSError):
                file.close()

    def add(self, ids: np.ndarray, trained: np.ndarray, rows: np.ndarray) -> None:
        """Append examples: their ids and masks end to end, and their ROWs, whose ends count from the very first."""
        with writing(self.folder):
            for name, values in (("ids", ids), ("trained", trained), ("rows", rows)):
                self._files[name].write(np.ascontiguousarray(values, dtype=_ARRAYS[name]).data)
                self._counts[name] += len(values)

    def finish(self, facts: Facts) -> None:
        """Write the headers and the facts, and wait until all of it is on the disk."""
        sizes = {}
        with writing(self.folder):
            for name, file in self._files.items():
                file.seek(0)
                self._write_header(name)
                file.flush()
                os.fsync(file.fileno())
                sizes[f"{name}.npy"] = os.fstat(file.fileno()).st_size
            with (self.folder / FACTS).open("w", encoding="utf-8") as text:
                json.dump({"sizes": sizes, "facts": facts.to_json()}, text, indent=1)
                text.flush()
                os.fsync(text.fileno())

    def _write_header(self, name: str) -> None:
        # numpy leaves room for any number of rows in a header, so that the last one takes the place of the first.
        described = np.lib.format.dtype_to_descr(_ARRAYS[name])  # type: ignore[no-untyped-call]
        header = {"descr": described, "fortran_order": False, "shape": (self._counts[name],)}
        np.lib.format.write_array_header_1_0(self._files[name], header)  # type: ignore[no-untyped-call]


def read_stored(folder: Path, where: Where) -> tuple[Facts, Stored]:
    """What was written into a folder, its arrays mapped. They stay when the folder is removed.

    Raises:
        DamagedError: it is not there, not whole, or not what a `Writer` writes.
    """
    try:
        written = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        facts = Facts.of_json(written["facts"])
        arrays = {}
        for name, dtype in _ARRAYS.items():
            path = folder / f"{name}.npy"
            if path.stat().st_size != written["sizes"][path.name]:
                raise DamagedError(f"{path}: is not as long as it was written")
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            if mapped.dtype != dtype:
                raise DamagedError(f"{path}: holds {mapped.dtype}")
            arrays[name] = np.asarray(mapped)  # a plain view: a memmap makes another memmap of every slice
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{folder}: {error}") from error
    tokens = int(arrays["rows"]["end"][-1]) if len(arrays["rows"]) else 0
    if not tokens == len(arrays["ids"]) == len(arrays["trained"]) == facts.tokens:
        raise DamagedError(f"{folder}: its arrays do not fit each other")
    return facts, Stored(**arrays, largest_id=facts.largest_id, where=where)
