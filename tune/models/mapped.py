"""Give back the memory of checkpoint files that a loader maps but has finished reading.

transformers reads safetensors files through mappings of whole files, and every page that was read stays in the
process's memory until the file is closed, at the end of loading: the process grows to the size of the checkpoint.
A mapping that nobody writes to can be emptied at any time, since what is needed again is read again from the file.

Only mappings that came to be after `MappedFiles` did are touched. An older one may belong to a model whose weights
were changed in memory, and would lose the changes.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_MADV_DONTNEED = 4
"""Linux's number for it."""


class MappedFiles:
    """The mappings of some files that this process makes from now on; of none, where there is no Linux."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self._paths = {str(Path(file).resolve()) for file in files}
        self._older = set(self._ranges())

    def release(self) -> None:
        """Empty them; tensors that lie in them stay valid."""
        ranges = [found for found in self._ranges() if found not in self._older]
        if not ranges:
            return
        advise = ctypes.CDLL(None).madvise
        for start, end in ranges:
            # A refusal costs memory and nothing else.
            advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)

    def _ranges(self) -> list[tuple[int, int]]:
        if sys.platform != "linux" or not self._paths:
            return []
        found = []
        try:
            with open(_MAPS, encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    # Addresses, rights, offset, device, inode, and a path that may hold spaces.
                    fields = line.rstrip("\n").split(maxsplit=5)
                    if len(fields) == 6 and fields[5] in self._paths:
                        start, _, end = fields[0].partition("-")
                        found.append((int(start, 16), int(end, 16)))
        except OSError:
            return []
        return found


def give_back_heap() -> None:
    """Return to the system what was freed: the C library keeps blocks of up to 32 MB, whole layers among them."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have no such hoard
        if trim is not None:
            trim(0)
