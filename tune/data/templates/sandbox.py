"""A process of its own in which chat templates are rendered, so that none of them can do harm.

A template is a program that somebody else wrote: a base brings one, a recipe names one, a run folder holds one.
transformers renders it in jinja's sandbox, which keeps it from Python's inside. That sandbox bounds neither time nor
memory, and one call in C (`'a' * 10**10`, or a list that holds itself twice, forty times over, written out) cannot be
interrupted from within. So rendering happens in a second process (`confined`), which is ended when it takes too long,
has a limit of memory, and gives up its right to open or change anything before it sees the first template: should the
sandbox itself have a hole, there is nothing behind it.

The process is started when the first template is needed, serves one thread, and ends with this one. Both write JSON to
each other. A conversation at a time takes longer than rendering here would; thousands at a time take less, since this
process goes on meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import IO, Any

from tune.data.conversation import BadRowError, Conversation
from tune.data.templates.jinja_writing import JinjaWriting, turns_of
from tune.data.templates.left_out import Messages
from tune.data.templates.segment import Segment
from tune.errors import DataError

SECONDS = 5.0
"""CPU time that a template may take for one conversation."""
MEMORY = 512 << 20
"""Bytes that the process may take for templates and what they are given."""
NO_MEMORY = 70
"""Exit code of the process where not even an answer found room."""

Prompts = list[list[Segment] | BadRowError]

LENGTH = struct.Struct("<Q")
"""Of a frame of JSON, either way."""
_LONGEST = 1 << 30
_PIPE = 1 << 20
_AT_ONCE = 1 << 22
"""Characters sent together, about, and held by both processes."""
_KNOWN = 32
"""Templates that the process remembers."""

# No token is among them. LC_* is given besides.
_ENVIRONMENT = ("HOME", "LANG", "LANGUAGE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "VIRTUAL_ENV")
_BEGIN = (
    "import sys; sys.path[:] = sys.argv[2:]; from tune.data.templates.confined import serve; serve(float(sys.argv[1]))"
)


def write(writing: JinjaWriting, conversations: Sequence[Conversation], prompt: bool = False) -> Callable[[], Prompts]:
    """Begin to write conversations; what is returned waits, and returns each one's segments or why there are none.

    Args:
        writing: the template.
        conversations: what to write.
        prompt: write each up to where the next answer starts.

    Raises:
        DataError: of the template as a whole, or it takes too much time or memory; it may come while waiting.
    """
    room = _room()
    pieces = _pieces(conversations)
    first = next(pieces, [])
    room.ask(writing, "segments", _listed([*first, _json(prompt)]))

    def wait() -> Prompts:
        made = room.prompts(writing)
        for piece in pieces:
            room.ask(writing, "segments", _listed([*piece, _json(prompt)]))
            made += room.prompts(writing)
        return made

    return wait


def check(writing: JinjaWriting) -> None:
    """As `JinjaWriting.check`. Raises DataError."""
    _room().value(writing, "check")


def end_of_turn(writing: JinjaWriting) -> str | None:
    """As `JinjaWriting.end_of_turn`; None too for a template that cannot end."""
    try:
        found = _room().value(writing, "end_of_turn")
    except DataError:
        return None
    return found if isinstance(found, str) else None


def plain(writing: JinjaWriting, messages: Messages) -> str:
    """As `JinjaWriting.plain`. Raises DataError."""
    return str(_room().value(writing, "plain", _json(messages)))


def _pieces(conversations: Sequence[Conversation]) -> Iterator[list[str]]:
    """Conversations in order as JSON, as many together as are not too long."""
    piece: list[str] = []
    size = 0
    for conversation in conversations:
        try:
            piece.append(_json(turns_of(conversation)))
        except (RecursionError, TypeError):  # nested too deeply, or with keys that are no text
            piece.append("null")
        size += len(piece[-1])
        if size > _AT_ONCE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def _listed(items: Iterable[str]) -> str:
    return f"[{','.join(items)}]"


def _as_json(value: object) -> object:
    """What JSON has no word for: a date, from a Parquet file, can only be written as a text."""
    return dict(value) if isinstance(value, Mapping) else str(value)


_json = json.JSONEncoder(ensure_ascii=False, check_circular=False, default=_as_json).encode


def packed(segments: list[Segment]) -> tuple[str, list[int], list[int]]:
    """Segments as they are sent back: the text, where each ends, and what each is."""
    ends = accumulate(len(segment.text) for segment in segments)
    return "".join(s.text for s in segments), list(ends), [s.trained + 2 * s.control for s in segments]


_KINDS = ((False, False), (True, False), (False, True), (True, True))


def _unpacked(text: str, ends: list[int], kinds: list[int]) -> list[Segment]:
    start, made = 0, []
    for end, kind in zip(ends, kinds, strict=True):
        made.append(Segment(text[start:end], *_KINDS[kind]))
        start = end
    return made


class _Room:
    """The process, and the way to it.

    Raises:
        DataError: it cannot be started.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._busy = True
        self._known: dict[int, tuple[int, JinjaWriting]] = {}
        environment = {k: v for k, v in os.environ.items() if k in _ENVIRONMENT or k.startswith("LC_")}
        command = [sys.executable, "-I", "-W", "ignore", "-c", _BEGIN, str(SECONDS), *sys.path]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
        except OSError as error:
            raise DataError(f"template: the process that renders it cannot be started ({error}). Try again.") from None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to: IO[bytes] = self._process.stdin
        self._from: IO[bytes] = self._process.stdout
        with contextlib.suppress(OSError):  # it only lets the process run ahead further
            fcntl.fcntl(self._from, fcntl.F_SETPIPE_SZ, _PIPE)
        said = self._read()
        if said != ["ready"]:
            reason = said[1] if said else f"exit code {self.close()}"
            raise DataError(f"template: the process that renders it ends at its start ({reason}). Try again.")
        self._busy = False

    @property
    def free(self) -> bool:
        """Whether it can be asked something."""
        return self._owner == os.getpid() and not self._busy and self._process.poll() is None

    def ask(self, writing: JinjaWriting, what: str, given: str = "null") -> None:
        """Send a request, whose answers are read next.

        Args:
            writing: the template.
            what: is asked of it.
            given: JSON of what the answer depends on.

        Raises:
            DataError: the process has ended.
        """
        sent = None
        known = self._known.get(id(writing))
        if known is None:
            if len(self._known) == _KNOWN:
                self._known.clear()
            known = self._known[id(writing)] = len(self._known), writing
            sent = writing
        fields = _json(sent and sent.fields())
        frame = _listed((_json(known[0]), fields, _json(what), given)).encode("utf-8", "surrogatepass")
        self._busy = True
        try:
            self._to.write(LENGTH.pack(len(frame)) + frame)
            self._to.flush()
        except OSError:
            raise self._ended(writing) from None

    def prompts(self, writing: JinjaWriting) -> Prompts:
        """The answers to a request for segments."""
        made: Prompts = []
        while (said := self._answer(writing))[0] == "some":
            made += [BadRowError(one) if isinstance(one, str) else _unpacked(*one) for one in said[1]]
        return made

    def value(self, writing: JinjaWriting, what: str, given: str = "null") -> Any:
        """The answer to another request."""
        self.ask(writing, what, given)
        return self._answer(writing)[1]

    def close(self) -> int:
        """End the process and return its exit code: 0, if it had not ended before."""
        if self._owner != os.getpid():  # a fork of the one that started it, which alone can wait for it
            self._process.returncode = 0
        for stream in (self._to, self._from):
            with contextlib.suppress(OSError):  # what is left in its buffer finds no reader
                stream.close()
        if self._process.returncode is None:
            try:
                return self._process.wait(1)
            except subprocess.TimeoutExpired:
                self._process.kill()
        return self._process.wait()

    def _answer(self, writing: JinjaWriting) -> list[Any]:
        said = self._read()
        if said is None:
            raise self._ended(writing)
        kind = said[0]
        self._busy = kind == "some"
        if kind == "bad":
            raise BadRowError(said[1])
        if kind == "wrong":
            raise DataError(said[1])
        return said

    def _read(self) -> list[Any] | None:
        """The next frame; None where the process has ended, or writes what it should not."""
        head = self._from.read(LENGTH.size)
        size = LENGTH.unpack(head)[0] if len(head) == LENGTH.size else _LONGEST + 1
        body = self._from.read(size) if size <= _LONGEST else b""
        if len(body) != size:
            return None
        said: list[Any] = json.loads(body)
        return said

    def _ended(self, writing: JinjaWriting) -> DataError:
        code = self.close()
        if code == -signal.SIGPROF:
            why = f"takes more than {SECONDS:g} seconds for one conversation"
        elif code in (NO_MEMORY, -signal.SIGKILL):
            why = f"takes more than {MEMORY >> 20} MB of memory for one conversation"
        else:
            why = f"ends the process that renders it ({code})"
        return DataError(f"template {writing.name}: {why}, and was stopped. Mend it, or choose another template.")


class _Rooms(threading.local):
    """Each thread's process: an answer must reach who asked."""

    room: _Room | None = None


_rooms = _Rooms()


def _room() -> _Room:
    if _rooms.room is not None and not _rooms.room.free:
        _close()
    if _rooms.room is None:
        _rooms.room = _Room()
    return _rooms.room


@atexit.register
def _close() -> None:
    room, _rooms.room = _rooms.room, None
    if room is not None:
        room.close()
