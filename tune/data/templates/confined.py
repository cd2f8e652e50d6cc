"""The process in which templates are rendered: see `sandbox`, which starts it and talks to it."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any

from tune.data.conversation import BadRowError
from tune.data.sources.json_values import TOO_DEEP
from tune.data.templates.jinja_writing import JinjaWriting, Turns
from tune.data.templates.sandbox import LENGTH, MEMORY, NO_MEMORY, packed
from tune.errors import DataError

_TOGETHER = 32
"""Prompts sent back together."""
_MUCH = 1 << 20
"""Or so many characters."""

_USED = (
    *("compile", "exec", "code.__new__", "object.__getattr__", "object.__setattr__"),
    *("sys._getframe", "builtins.id"),
)
"""What Python tells its audit hooks of while templates are compiled and rendered."""


def serve(seconds: float) -> None:
    """Answer requests from stdin on stdout until there are no more.

    Args:
        seconds: of computing that a template may take for one conversation.
    """
    with open(0, "rb", closefd=False) as requests, open(os.dup(1), "wb") as answers:
        try:
            # A library that prints must not do so into an answer, and whoever stops the run stops this process too.
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            _rehearse()
            _confine()
        except Exception as error:
            _send(answers, ["failed", f"{type(error).__name__}: {error}"])
            return
        _send(answers, ["ready"])
        known: dict[int, JinjaWriting] = {}
        try:
            while len(head := requests.read(LENGTH.size)) == LENGTH.size:
                number, fields, what, given = json.loads(requests.read(LENGTH.unpack(head)[0]))
                if fields is not None:
                    known[number] = JinjaWriting(*fields)
                for answer in _answers(known[number], what, given, seconds):
                    _send(answers, answer)
        except MemoryError:
            os._exit(NO_MEMORY)
        except BrokenPipeError:  # whoever asked has gone
            os._exit(0)


def _answers(writing: JinjaWriting, what: str, given: Any, seconds: float) -> Iterator[list[Any]]:
    try:
        if what == "segments":
            yield from _segments(writing, given[:-1], given[-1], seconds)
            yield ["done", None]
        else:
            _limit(seconds)
            yield ["done", writing.plain(given) if what == "plain" else getattr(writing, what)()]
    except BadRowError as error:
        yield ["bad", str(error)]
    except DataError as error:
        yield ["wrong", str(error)]
    finally:
        _limit(0)


def _segments(
    writing: JinjaWriting, conversations: Sequence[Turns | None], prompt: bool, seconds: float
) -> Iterator[list[Any]]:
    some: list[Any] = []
    size = 0
    for turns in conversations:
        _limit(seconds)
        try:
            made: Any = TOO_DEEP if turns is None else packed(writing.segments(turns, prompt))
            size += len(made[0])
        except BadRowError as error:
            made = str(error)
        except RecursionError:
            made = TOO_DEEP
        some.append(made)
        if len(some) == _TOGETHER or size > _MUCH:
            yield ["some", some]
            some, size = [], 0
    yield ["some", some]


def _send(answers: IO[bytes], said: list[Any]) -> None:
    body = json.dumps(said, ensure_ascii=False).encode("utf-8", "backslashreplace")
    answers.write(LENGTH.pack(len(body)) + body)
    answers.flush()


def _limit(seconds: float) -> None:
    """End the process when it has computed for so long; time that it is kept waiting or stopped does not count."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def _rehearse() -> None:
    """Render a template that uses what is loaded on first use: nothing can be once the process is confined."""
    jinja = (
        "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{% if m.role == 'user' %}{{ f(m.content) }}"
        "{% else %}{% generation %}{{ m | tojson | indent }}{{ eos_token | pprint }}{% endgeneration %}{% endif %}"
        "{% endfor %}{{ strftime_now('%d %B %Y %Z') }}{{ lipsum(n=1) }}{{ [2, 1] | sort | join }}"
        "{{ '<a>' | urlize | striptags }}"
    )
    JinjaWriting("rehearsal.jinja", jinja, {"eos_token": "</s>"}, ("</s>",)).check()
    for wrong in ("{{ x.y.z }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"):
        with_error = JinjaWriting("rehearsal", wrong, {})
        try:
            with_error.plain([])
        except DataError:
            continue


def _confine() -> None:
    """Give up files, processes and all memory but a little; there is no way back."""
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    nothing = (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE)
    for limit in nothing:
        resource.setrlimit(limit, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in _USED:
        raise PermissionError(f"a template may not do this ({event})")
