"""Chat templates made to do harm: each ends in one message, soon, in bounded memory, and reaches nothing."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.mistakes import CHECK, assert_refused, mistake
from tune.data.conversation import BadRowError, Conversation, Message
from tune.data.templates import sandbox
from tune.data.templates.jinja_template import JinjaTemplate
from tune.data.templates.jinja_writing import JinjaWriting
from tune.data.templates.resolve import LONGEST, resolve_template
from tune.errors import DataError
from tune.export.prompt import read_prompt

ANSWER = "{% generation %}{{ messages[0].content }}{% endgeneration %}"
GOOD = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
HI = [{"role": "user", "content": "hi"}]


def grown(start: str, step: str, end: str = "", name: str = "a") -> str:
    """A template that makes a value of itself, sixty times over."""
    loop = f"{{% for i in range(60) %}}{{% set {name}.x = {step} %}}{{% endfor %}}"
    return f"{{% set {name} = namespace(x={start}) %}}{loop}{end}"


REACHING = {
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes through a filter": "{{ (''|attr('__class__')).__mro__ }}",
    "classes through map": "{{ (['']|map(attribute='__class__')|first).__mro__ }}",
    "classes through format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "classes through a format kept": "{% set f = '{0.__class__.__mro__}'.format %}{{ f(messages) }}",
    "classes through format_map": "{{ '{x.__class__.__mro__}'.format_map({'x': messages}) }}",
    "globals of cycler": "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "globals of lipsum": "{{ lipsum.__globals__['os'].system('touch MARK') }}",
    "globals of an added function": "{{ raise_exception.__globals__['json'].codecs.open('MARK', 'w') }}",
    "globals of another": "{{ strftime_now.__globals__['sys'].modules['os'].system('touch MARK') }}",
    "the context": "{{ self._TemplateReference__context.environment.compile('1') }}",
    "a class for a namespace": "{% set n = namespace() %}{% set n.__class__ = cycler %}",
    "a list": "{{ messages.append(1) }}",
    "a dictionary": "{{ messages[0].update({'role': 'x'}) }}",
    "a file": "{% include 'MARK' %}",
    "a file's macros": "{% import 'MARK' as x %}",
    "a file as parent": "{% extends 'MARK' %}",
    "a statement": "{% do messages.clear() %}",
    "a codec": "{{ 'a'.encode('idna') }}",
}
"""What each wants."""

GROWING = {
    "product": "{{ 'a' * 10 ** 10 }}",
    "width": "{{ '%0999999999d' % 1 }}",
    "width by a filter": "{{ '%999999999d'|format(1) }}",
    "width by format": "{{ '{:>9999999999}'.format('a') }}",
    "center": "{{ 'a'.center(10 ** 10) }}",
    "center by a filter": "{{ 'a'|center(10 ** 10) }}",
    "indent": "{{ 'a\\nb'|indent(10 ** 10) }}",
    "batch": "{{ [1]|batch(10 ** 10, 0)|list }}",
    "doubled": grown("'aaaaaaaa'", "a.x ~ a.x"),
    "lists": grown("[1]", "[a.x, a.x]", "{{ a.x }}"),
    "replaced": grown("'aaaaaaaa'", "a.x|replace('a', 'aaaa')"),
    "output": "{% for i in range(99999) %}{{ 'x' * 100000 }}{% endfor %}",
    "more than it was given": "{{ 'x' * 300000 }}",
    "reason": "{{ raise_exception('x' * 10 ** 8) }}",
}

ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "equal lists": grown("[1]", "[a.x, a.x]") + grown("[1]", "[b.x, b.x]", "{{ a.x == b.x }}", "b"),
    "json": grown("[1]", "[a.x, a.x]", "{{ a.x|tojson }}"),
    "power": "{{ (9 ** 9) ** (9 ** 9) }}",
    "macros": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(90) }}",
    "text": "{{ lipsum(n=10 ** 9) }}",
    "round": "{{ 1|round(10 ** 9, 'ceil') }}",
    "key": grown("(1,)", "(a.x, a.x)", "{{ {a.x: 1} }}"),
}

SYNTAX = {
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "lists": "{{ " + "[" * 3000 + "]" * 3000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "filters": "{{ 1" + "|string" * 20_000 + " }}",
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "macro in itself": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "loop in itself": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "half a character": "{{ '\\ud800' }}",
    "block open": "{% generation %}{{ 1 }}",
    "tag of no extension": "{% debug %}",
}


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that is patient for half a second."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.5)
    sandbox._close()
    yield
    sandbox._close()


def writing(jinja: str, name: str = "own.jinja") -> JinjaWriting:
    return JinjaWriting(name, ANSWER + jinja, {"eos_token": "</s>"}, ("</s>",))


def refused(jinja: str) -> str:
    with pytest.raises(DataError) as caught:
        sandbox.plain(writing(jinja), HI)
    said = str(caught.value)
    assert said.startswith("template own.jinja")
    assert len(said) < 700, "one message, and not what a template makes of it"
    assert "Traceback" not in said
    return said


@pytest.mark.parametrize("name", REACHING)
def test_a_template_that_reaches_out_gets_nothing(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    jinja = REACHING[name].replace("MARK", str(mark))
    # What jinja's sandbox holds back is an error, or undefined, and writes nothing.
    with contextlib.suppress(DataError):
        assert sandbox.plain(writing(jinja), HI) == "hi"
    assert not mark.exists()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "lists" else ()) for name in GROWING]
)
def test_a_template_that_grows_is_refused(name: str) -> None:
    refused(GROWING[name])
    room = sandbox._rooms.room
    assert room is not None
    if room.free:  # else it took too long as well
        status = Path(f"/proc/{room._process.pid}/status").read_text()
        assert int(status.partition("VmHWM:")[2].split()[0]) * 1024 < sandbox.MEMORY + (200 << 20)


@pytest.mark.parametrize(
    "name", [name if i < 3 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(ENDLESS)]
)
def test_a_template_that_does_not_end_is_stopped(name: str, hurried: None) -> None:
    started = time.monotonic()
    said = refused(ENDLESS[name])
    assert "takes more than 0.5 seconds" in said
    assert time.monotonic() - started < 20
    assert sandbox.plain(writing(""), HI) == "hi", "the next template is none the worse for it"


@pytest.mark.parametrize("name", SYNTAX)
def test_a_template_that_is_hard_to_read_is_refused(name: str) -> None:
    refused(SYNTAX[name])


def test_one_row_may_be_too_much_for_a_template(hurried: None, mistral_like) -> None:
    """Found while the rows are read, though it passed its trial."""
    jinja = GOOD + "{% if 'x' in messages[0].content %}" + ENDLESS["loops"] + "{% endif %}"
    template = JinjaTemplate("own.jinja", jinja, mistral_like)
    template.check_tokenizer(mistral_like)
    fine, hard = (Conversation.of(("user", text), ("assistant", "b")) for text in "ax")
    assert template.segments(fine)
    wait = template.begin([fine] * 50 + [hard] + [fine] * 50)
    with pytest.raises(DataError, match=r"own\.jinja: takes more than") as caught:
        wait()
    assert not isinstance(caught.value, BadRowError), "it is not for data.on_bad to drop every row, half a second each"


def test_many_at_once_are_what_one_at_a_time_are(mistral_like, monkeypatch: pytest.MonkeyPatch) -> None:
    template = JinjaTemplate("own.jinja", GOOD, mistral_like)
    refusing = JinjaTemplate("t", "{% if messages[0].content == 'no' %}{{ raise_exception('n') }}{% endif %}" + GOOD)
    texts = ["a", "</s> é 🙂 \u2028", "no", "b" * 5000, "\x00\x1b", "c"] * 20
    talks = [Conversation.of(("user", text), ("assistant", text[::-1])) for text in texts]
    monkeypatch.setattr(sandbox, "_AT_ONCE", 6000)
    for one in (template, refusing.bind(mistral_like)):
        together = one.begin(talks)()
        assert len(together) == len(talks)
        for talk, made in zip(talks, together, strict=True):
            if isinstance(made, BadRowError):
                with pytest.raises(BadRowError) as caught:
                    one.segments(talk)
                assert str(caught.value) == str(made)
            else:
                assert made == one.segments(talk)
        assert sum(isinstance(made, BadRowError) for made in together) == (20 if one is not template else 0)


def test_a_row_that_cannot_be_sent_is_a_bad_row(mistral_like) -> None:
    deep: object = 1
    for _ in range(3000):
        deep = [deep]
    template = JinjaTemplate("own.jinja", GOOD, mistral_like)
    fine = Conversation.of(("user", "a"), ("assistant", "b"))
    nested = Conversation((Message("user", "a", extra={"x": deep}), Message("assistant", "b")))
    first, second, third = template.begin([fine, nested, fine])()
    assert first == third != second
    assert isinstance(second, BadRowError)
    assert "nested too deeply" in str(second)


def test_what_was_never_waited_for_is_not_given_to_the_next(mistral_like) -> None:
    template = JinjaTemplate("own.jinja", GOOD, mistral_like)
    template.begin([Conversation.of(("user", "a"), ("assistant", "old"))])
    segments = template.segments(Conversation.of(("user", "a"), ("assistant", "new")))
    assert "".join(segment.text for segment in segments) == "anew"


def test_a_fork_has_a_process_of_its_own() -> None:
    from tests.training.processes import fork, wait

    assert sandbox.plain(writing(""), HI) == "hi"
    room = sandbox._rooms.room

    def work() -> int:
        ours = sandbox.plain(writing("{{ 1 }}"), HI) == "hi1" and sandbox._rooms.room is not room
        sandbox._close()
        return 0 if ours else 1

    assert wait(fork(work)) == 0
    assert sandbox.plain(writing("{{ 2 }}"), HI) == "hi2"
    assert sandbox._rooms.room is room


ESCAPED = """
import sys
sys.path[:] = sys.argv[1:]
import os, resource, socket, subprocess, ctypes
from tune.data.templates.confined import _confine, _rehearse
_rehearse()
_confine()
tries = {
    "read": lambda: open("/etc/hostname"),
    "write": lambda: open("mark", "w"),
    "read below": lambda: os.open("/etc/hostname", os.O_RDONLY),
    "make": lambda: os.mkdir("mark"),
    "link": lambda: os.symlink("a", "mark"),
    "remove": lambda: os.remove("kept"),
    "rename": lambda: os.rename("kept", "mark"),
    "mode": lambda: os.chmod("kept", 0),
    "list": lambda: os.listdir("/"),
    "run": lambda: subprocess.run(["touch", "mark"]),
    "shell": lambda: os.system("touch mark"),
    "fork": lambda: os.fork(),
    "exec": lambda: os.execv("/bin/touch", ["touch", "mark"]),
    "connect": lambda: socket.socket().connect(("127.0.0.1", 9)),
    "library": lambda: ctypes.CDLL(None),
    "import": lambda: __import__("webbrowser"),
    "kill": lambda: os.kill(os.getppid(), 0),
    "fill": lambda: bytearray(1 << 30),
}
for name, attempt in tries.items():
    try:
        attempt()
    except (OSError, MemoryError, PermissionError) as error:
        continue
    print(name, "succeeded")
# The kernel refuses what Python's own watch might be got round for.
for name in ("NOFILE", "FSIZE", "NPROC", "CORE"):
    if resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) != (0, 0):
        print(name, "is not limited")
"""


def test_behind_the_sandbox_there_is_nothing(tmp_path: Path) -> None:
    """If a template broke out into Python, it could still do none of this."""
    (tmp_path / "kept").write_text("kept")
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", ESCAPED, *sys.path],
        capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"


def test_no_token_is_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop")
    sandbox._close()
    sandbox.plain(writing(""), HI)
    room = sandbox._rooms.room
    assert room is not None
    assert b"hf_abc" not in Path(f"/proc/{room._process.pid}/environ").read_bytes()


@pytest.fixture(scope="module")
def mistral_like(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    from tests.tiny import write_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 20)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (pipe, "is no plain file"),
        (device, "is no plain file"),
        (large, "is longer than the 1 MiB"),
        (lambda path: path.write_bytes(b"\xff\xfe{% generation %}"), "utf-8"),
        (lambda path: path.write_text(GOOD + " " * LONGEST), "is longer than the 1 MiB"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
)
def test_a_template_is_a_text_file_of_bounded_size(make, words: str, tmp_path: Path, mistral_like) -> None:
    path = tmp_path / "own.jinja"
    make(path)
    started = time.monotonic()
    with pytest.raises(DataError, match=words):
        resolve_template(str(path), mistral_like)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("name", ["a\0b.jinja", "~nobody-of-this-name/a.jinja", "a" * 5000 + ".jinja"])
def test_a_name_that_is_no_path_is_refused(name: str, mistral_like) -> None:
    with pytest.raises(DataError, match="template"):
        resolve_template(name, mistral_like)


@pytest.mark.parametrize("own", [["a"], 7, {"default": 3}, GOOD + " " * LONGEST])
def test_a_tokenizers_template_is_a_text_of_bounded_size(own: object, mistral_like) -> None:
    class Bringing:
        chat_template = own

    with pytest.raises(DataError, match=r"the tokenizer's chat template is"):
        resolve_template("auto", Bringing())  # type: ignore[arg-type]


@pytest.mark.parametrize("jinja", [GROWING["product"], REACHING["globals of cycler"], SYNTAX["parentheses"]])
def test_a_card_shows_no_prompt_of_a_template_that_fails(jinja: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "chat_template.jinja").write_text(jinja)
    assert read_prompt(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content + messages[1].content + eos_token }}")
    prompt = read_prompt(tmp_path)
    assert prompt is not None
    assert prompt.text.endswith("Paris.</s>")


def template_of_the_base(jinja: str):
    def put(work: Path) -> None:
        path = work / "base/tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": jinja}))

    return put


@pytest.mark.parametrize(
    "wrong",
    [
        mistake(
            "in the base's config",
            "template tokenizer",
            "takes more than 0.5 seconds",
            prepare=template_of_the_base(GOOD + ENDLESS["loops"]),
            data__template="tokenizer",
            arguments=CHECK,
        ),
        mistake(
            "in the base's file",
            "rows cannot be used",
            prepare=lambda work: (work / "base/chat_template.jinja").write_text(GOOD + GROWING["product"]),
            data__template="auto",
            lines=4,
            arguments=CHECK,
        ),
        mistake(
            "in a file of the recipe's",
            "own.jinja",
            "takes more than 0.5 seconds",
            prepare=lambda work: (work / "own.jinja").write_text(GOOD + ENDLESS["json"]),
            data__template="own.jinja",
            arguments=CHECK,
        ),
    ],
)
def test_a_verb_says_so_wherever_the_template_is(
    wrong, work: Path, hurried: None, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(work)
    assert_refused(wrong, work, capfd)


def test_generate_says_so_of_a_runs_template(work: Path, hurried: None, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter's own chat template is what a run that trained on a file answers with."""
    from tune.cli.main import _run

    recipe = work / "run/recipe.yaml"
    recipe.write_text(recipe.read_text().replace("template: alpaca", "template: own.jinja"))
    (work / "run/adapter/chat_template.jinja").write_text(GOOD + ENDLESS["loops"])
    monkeypatch.chdir(work)
    assert _run(["generate", "run", "hi", "--quiet"]) == 2
    assert "takes more than 0.5 seconds" in capfd.readouterr().err
