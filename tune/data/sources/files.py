"""One file of a source: opened without hanging, unpacked while it is read, and every mistake said by its name.

A reader asks for `blocks` (bytes), `text` (checked UTF-8) or `seekable` (a file object to jump about in). All of them
see that the file is still the one that was found: a digest and the rows read later must be of the same contents.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import os
import stat
import tempfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, Protocol

from tune.errors import DataError

BLOCK = 1 << 20
"""Bytes read at a time."""

# A few kilobytes can be packed so that they become terabytes. Text becomes 3 to 20 times as large, and rows that all
# hold one long list of tools a hundred times, or with Zstandard, whose repeats have no length, a thousand.
_GROWTH = {".gz": 250, ".zst": 2500}
_SMALL = 1 << 24

PACKED = {".gz": ("gzip", b"\x1f\x8b"), ".zst": ("Zstandard", b"\x28\xb5\x2f\xfd")}
"""Endings that say how a file is packed, each with the archive's name and its first bytes."""

# How contents begin that are not the text which the name promises.
_BEGINNINGS = {
    b"\x1f\x8b": "is packed with gzip. Let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is packed with Zstandard. Let its name end in .zst",
    b"PAR1": "is a Parquet file. Let its name end in .parquet",
    b"ARROW1": "is an Arrow file. Let its name end in .arrow",
    b"PK\x03\x04": "is a zip archive or a spreadsheet, not text. Unpack it, or save it as .csv",
    b"\xff\xfe": "is UTF-16, not UTF-8. Save the file as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8. Save the file as UTF-8",
}


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _State(NamedTuple):
    """What changes when a file's contents do, as far as the file system tells."""

    device: int
    inode: int
    size: int
    changed_ns: int


class File:
    """A regular file that can be read.

    Args:
        path: where it is.
        shown: how messages name it.
        ending: what says its kind, in lower case and without the packing's, such as ".jsonl".
        packing: ".gz", ".zst" or "".
        named: the columns that the recipe asks for by name.

    Raises:
        DataError: it is missing, no regular file, or not permitted.
    """

    def __init__(self, path: str, shown: str, ending: str, packing: str, named: frozenset[str] = frozenset()) -> None:
        self.path, self.shown, self.ending, self.packing, self.named = path, shown, ending, packing, named
        self._state: _State | None = None
        with self._raw():
            pass

    def feed(self, hasher: Any) -> None:
        """Update a hash with the file's size and its raw bytes."""
        with self._raw() as raw:
            hasher.update(os.fstat(raw.fileno()).st_size.to_bytes(8, "little"))
            while block := raw.read(BLOCK):
                hasher.update(block)

    def blocks(self, size: int = BLOCK) -> Iterator[bytes]:
        """The unpacked contents, at most `size` bytes at a time."""
        with self._raw() as raw:
            growth = _GROWTH.get(self.packing, 0)
            most = max(_SMALL, growth * os.fstat(raw.fileno()).st_size)
            unpacked = 0
            try:
                stream = self._unpacked(raw)
                while block := stream.read(size):
                    unpacked += len(block)
                    if growth and unpacked > most:
                        raise DataError(
                            f"{self.shown}: grows more than {growth} times when it is unpacked, which no rows do. "
                            "Unpack it yourself if it is what it should be."
                        )
                    yield block
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise self._bad_archive(error) from None
            except OSError as error:
                # pyarrow says what is wrong with an archive by an OSError without a number.
                if self.packing and error.errno is None:
                    raise self._bad_archive(error) from None
                raise

    def text(self, size: int = BLOCK) -> Iterator[str]:
        """The contents as text without a byte order mark, about `size` characters at a time, never an empty piece.

        What precedes a byte that is not UTF-8 is given out before the error is raised.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        lines, first = 1, True
        for block in self._with_end(size):
            if first:
                self._refuse_beginning(block)
            try:
                # An empty block is the end: what is left over then is a character that was cut off.
                piece = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                good = error.object[: error.start].decode("utf-8")
                if good := good.removeprefix("\ufeff") if first else good:
                    yield good
                line = lines + error.object.count(b"\n", 0, error.start)
                raise DataError(
                    f"{self.shown}:{line}: is not UTF-8 (byte 0x{error.object[error.start]:02x}). "
                    "Save the file as UTF-8."
                ) from None
            lines += piece.count("\n")
            if first and piece:
                first, piece = False, piece.removeprefix("\ufeff")
            if piece:
                yield piece

    @contextlib.contextmanager
    def seekable(self) -> Iterator[IO[bytes]]:
        """The unpacked contents as a file object that can jump; a packed file is unpacked into a temporary one."""
        if not self.packing:
            with self._raw() as raw:
                yield raw
            return
        with contextlib.ExitStack() as stack:
            try:
                unpacked = stack.enter_context(_temporary_file())
                for block in self.blocks():
                    unpacked.write(block)
                unpacked.seek(0)
            except OSError as error:
                raise DataError(
                    f"{self.shown}: cannot be unpacked into a temporary file ({error.strerror or error}). "
                    "Free some space, set TMPDIR, or unpack it yourself."
                ) from None
            yield unpacked

    def _with_end(self, size: int) -> Iterator[bytes]:
        yield from self.blocks(size)
        yield b""

    def _unpacked(self, raw: IO[bytes]) -> _Readable:
        if self.packing == ".gz":
            return gzip.GzipFile(fileobj=raw, mode="rb")
        if self.packing == ".zst":
            import pyarrow as pa

            stream: _Readable = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
            return stream
        return raw

    @contextlib.contextmanager
    def _raw(self) -> Iterator[IO[bytes]]:
        """The file as it lies there, held against what it was when it was found."""
        try:
            # A pipe would block an ordinary open until someone writes to it.
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"{self.shown}: {self._why(error)}") from None
        with open(descriptor, "rb") as raw:
            try:
                self._check_state(raw)
                yield raw
                self._check_state(raw)
            except OSError as error:
                raise DataError(f"{self.shown}: {self._why(error)}") from None

    def _check_state(self, raw: IO[bytes]) -> None:
        found = os.fstat(raw.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise DataError(
                f"{self.shown}: is no regular file but {_kind(found.st_mode)}. Its rows are read more than once: "
                "write them into a file first."
            )
        state = _State(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self._state is None:
            self._state = state
        elif state != self._state:
            raise DataError(f"{self.shown}: changed while it was being read. Start again when nothing writes to it.")

    def _why(self, error: OSError) -> str:
        if isinstance(error, FileNotFoundError) and self._state is not None:
            return "was there, and is gone. Put it back, and start again."
        if isinstance(error, FileNotFoundError) and os.path.islink(self.path):
            return f"is a link to {os.readlink(self.path)!r}, which is not there. Mend the link."
        remedy = (
            "Check the file's permissions." if isinstance(error, PermissionError) else "Check the file and its disk."
        )
        return f"cannot be read ({error.strerror or error}). {remedy}"

    def _bad_archive(self, error: Exception) -> DataError:
        name, magic = PACKED[self.packing]
        with self._raw() as raw:
            beginning = raw.read(len(magic))
        if beginning != magic:
            return DataError(
                f"{self.shown}: is no {name} archive. If it is not packed, take {self.packing} from its name."
            )
        if isinstance(error, EOFError) or "Truncated" in str(error):
            return DataError(f"{self.shown}: ends in the middle of its {name} archive. Copy or fetch it again.")
        return DataError(f"{self.shown}: is a damaged {name} archive ({error}). Copy or fetch it again.")

    def _refuse_beginning(self, block: bytes) -> None:
        for beginning, words in _BEGINNINGS.items():
            if block.startswith(beginning):
                raise DataError(f"{self.shown}: {words}.")


@contextlib.contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    file = tempfile.TemporaryFile()  # noqa: SIM115  closed below
    try:
        yield file
    finally:
        # On a full disk, what is left in its buffer finds no room either.
        with contextlib.suppress(OSError):
            file.close()


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return "a device"
    return "a folder" if stat.S_ISDIR(mode) else "a socket"
