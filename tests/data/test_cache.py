"""What was encoded is found again, and only where nothing that its tokens depend on has changed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import fixture_path
from tune.cli.check import check
from tune.cli.preview import preview
from tune.data.cache import KEPT_DAYS, Cache, code_digest, template_words
from tune.data.encode import Encoder
from tune.data.examples import ROW, Examples
from tune.data.facts import Facts, Tally
from tune.data.held_out import repeated
from tune.data.load import Data, load_data
from tune.data.sources import Place
from tune.data.store import FACTS, Writer, read_stored
from tune.data.templates import TEMPLATES
from tune.data.templates.resolve import resolve_template
from tune.data.tokenizer import load_tokenizer
from tune.errors import DataError
from tune.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]
ROWS = [{"instruction": f"Say {n}.", "output": f"It is {n}, I say."} for n in range(40)]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(str(fixture_path("models/stories260K-mistral")))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Where entries lie. What goes to a temporary folder instead can be seen to leave it again."""
    monkeypatch.setenv("TUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many prompts were tokenised, call by call."""
    counts: list[int] = []
    encode = Encoder.encode

    def counting(self, prompts):
        counts.append(len(prompts))
        return encode(self, prompts)

    monkeypatch.setattr(Encoder, "encode", counting)
    return counts


@pytest.fixture
def recipe(tmp_path):
    def make(*sources, **data):
        """Each source is (name, rows) or (name, rows, options)."""
        listed = []
        for name, rows, *options in sources:
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            listed.append({"path": str(tmp_path / name), **(options[0] if options else {})})
        values = {"train": listed, "template": "alpaca", **data}
        return load_recipe({"model": {"base": "x"}, "data": values, "output": str(tmp_path / "run")})

    return make


def contents(data: Data) -> list[object]:
    """All that a training sees of the data."""
    found: list[object] = [data.fingerprint, data.report]
    for part in (data.train, data.eval):
        for index in range(len(part) if part is not None else 0):
            ids, trained = part.example(index)
            found.append((ids.tolist(), trained.tolist(), part.where(index), part.source[index], part.cut[index]))
    return found


def problems(made, tokenizer) -> list[str]:
    with pytest.raises(DataError) as caught:
        load_data(made, tokenizer)
    return caught.value.problems


def test_a_second_start_reads_no_row_and_sees_the_same(recipe, tokenizer, encoded, monkeypatch):
    turns = [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    made = recipe(
        ("a.jsonl", [*ROWS, ROWS[3], {"instruction": "x", "output": ""}, {"instruction": "y", "output": "word " * 90}]),
        ("b.jsonl", [{"conversations": turns}, {"instruction": "no"}, {"conversations": turns}]),
        on_bad="drop",
        max_length=200,
        eval=0.2,
        system="Be kind.",
    )
    first = load_data(made, tokenizer)
    report = first.report
    assert (report.cached, report.cache_problem) == (0, None)
    assert (report.sources[0].truncated, report.sources[0].dropped_bad, report.sources[0].duplicates) == (1, 1, 1)
    assert report.sources[1].duplicates == 1
    assert sum(encoded) == 44
    monkeypatch.setattr("tune.data.prepare.Reader", lambda *_: pytest.fail("read the rows"))
    monkeypatch.setattr("tune.data.load.Reader", lambda *_: pytest.fail("looked at the rows"))
    again = load_data(made, tokenizer)
    assert contents(again) == contents(first)
    assert again.report.warnings() == report.warnings()
    assert again.report.cached == 2
    assert sum(encoded) == 44


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 200},
        {"train_on": "all"},
        {"train_on": "last_response"},
        {"system": "Be kind."},
        {"on_long": "drop"},
        {"on_bad": "drop"},
        {"template": "vicuna"},
    ],
    ids=str,
)
def test_an_option_that_shapes_examples_is_another_entry(recipe, tokenizer, encoded, change):
    load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    load_data(recipe(("a.jsonl", ROWS), **change), tokenizer)
    assert encoded == [40, 40]


def test_options_of_a_source_are_in_the_key_and_its_weight_and_name_are_not(recipe, tokenizer, encoded):
    load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    load_data(recipe(("a.jsonl", ROWS, {"weight": 2.0})), tokenizer)
    copied = load_data(recipe(("copy.jsonl", ROWS)), tokenizer)
    assert encoded == [40]
    assert copied.train.where(3).endswith("/copy.jsonl:4")
    assert copied.report.sources[0].path.endswith("/copy.jsonl")
    load_data(recipe(("a.jsonl", ROWS, {"limit": 30})), tokenizer)
    load_data(recipe(("a.jsonl", ROWS, {"format": "alpaca"})), tokenizer)
    load_data(recipe(("a.jsonl", ROWS, {"columns": {"input": "output", "output": "instruction"}})), tokenizer)
    assert encoded == [40, 30, 40, 40]


def test_an_edited_file_is_read_again(recipe, tokenizer, encoded):
    first = load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    edited = [*ROWS[:-1], {**ROWS[-1], "output": ROWS[-1]["output"].replace("I", "J")}]
    second = load_data(recipe(("a.jsonl", edited)), tokenizer)
    assert encoded == [40, 40]
    assert second.fingerprint != first.fingerprint
    assert load_data(recipe(("a.jsonl", ROWS)), tokenizer).fingerprint == first.fingerprint
    assert encoded == [40, 40]


def test_another_tokenizer_is_another_entry(recipe, tokenizer, encoded):
    made = recipe(("a.jsonl", ROWS))
    load_data(made, tokenizer)
    other = load_tokenizer(str(fixture_path("models/stories260K-mistral")))
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding()
    load_data(made, other)  # the same, although it was used in between
    assert encoded == [40]
    other.add_tokens(["kangaroo"])
    load_data(made, other)
    assert encoded == [40, 40]
    other.add_special_tokens({"pad_token": "</s>"})
    load_data(made, other)
    assert encoded == [40, 40, 40]


def test_an_edited_template_is_another_entry(recipe, tokenizer, encoded, tmp_path):
    path = tmp_path / "own.jinja"
    made = recipe(("a.jsonl", ROWS), template=str(path))
    for end in ("", "!"):
        path.write_text(
            "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}" + end
        )
        load_data(made, tokenizer)
        load_data(made, tokenizer)
    assert encoded == [40, 40]


def test_a_template_that_writes_the_date_is_another_one_every_day(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "dated.jinja"
    path.write_text("{{ strftime_now('%d') }}{% generation %}{{ messages[-1].content }}{% endgeneration %}")
    dated, plain = resolve_template(str(path), tokenizer), resolve_template("alpaca", tokenizer)
    before = [template_words(dated), template_words(plain)]
    monkeypatch.setattr(time, "strftime", lambda form: "2001-02-03")
    assert template_words(dated) != before[0]
    assert template_words(plain) == before[1]


def test_the_words_of_a_template_are_those_of_what_it_is_bound_to(mistral_v1, mistral_v3, chatml):
    for name in (*TEMPLATES, "tokenizer"):
        seen = []
        for tokenizer in (mistral_v1, mistral_v3, chatml):
            try:
                one, other = resolve_template(name, tokenizer), resolve_template(name, tokenizer)
            except DataError:
                continue
            assert template_words(one) == template_words(other)
            assert "0x" not in json.dumps(template_words(one)), "an address differs in every process"
            seen.append(one)
        assert seen, name
    llama, other = (template_words(resolve_template("alpaca", tokenizer)) for tokenizer in (mistral_v1, chatml))
    assert llama["bound"] != other["bound"], "its end token is another"
    assert llama["jinja"] != other["jinja"], "it begins without a begin token"


def test_a_source_more_does_not_touch_the_others(recipe, tokenizer, encoded):
    load_data(recipe(("a.jsonl", ROWS[:10])), tokenizer)
    both = load_data(recipe(("b.jsonl", ROWS[10:30]), ("a.jsonl", ROWS[:10])), tokenizer)
    assert encoded == [10, 20]
    assert both.report.cached == 1
    assert both.train.source.tolist() == [0] * 20 + [1] * 10
    assert both.train.where(25).endswith("a.jsonl:6")


def test_the_program_is_in_the_key(recipe, tokenizer, encoded, tmp_path, monkeypatch):
    code = tmp_path / "code"
    (code / "below").mkdir(parents=True)
    digests = []
    for name, text in (("a.py", "x"), ("below/b.py", "y"), ("below/b.py", "z"), ("notes.txt", "no code")):
        (code / name).write_text(text)
        digests.append(code_digest(code))
    assert len(set(digests[:3])) == 3
    assert digests[3] == digests[2]
    (code / "below" / "b.py").rename(code / "below" / "c.py")
    assert code_digest(code) != digests[3]
    made = recipe(("a.jsonl", ROWS))
    load_data(made, tokenizer)
    monkeypatch.setattr("tune.data.cache._program", lambda: {"code": "another"})
    load_data(made, tokenizer)
    assert encoded == [40, 40]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGE = {
    "ids cut": lambda entry: cut(entry / "ids.npy"),
    "mask cut": lambda entry: cut(entry / "trained.npy"),
    "rows cut": lambda entry: cut(entry / "rows.npy"),
    "mask longer": lambda entry: os.truncate(entry / "trained.npy", (entry / "trained.npy").stat().st_size + 8),
    "ids gone": lambda entry: (entry / "ids.npy").unlink(),
    "facts gone": lambda entry: (entry / FACTS).unlink(),
    "facts cut": lambda entry: cut(entry / FACTS),
    "facts of another kind": lambda entry: (entry / FACTS).write_text("[1]"),
    "facts of another version": lambda entry: (entry / FACTS).write_text(
        (entry / FACTS).read_text().replace('"rows"', '"lines"')
    ),
    "pickled": lambda entry: pickled(entry / "ids.npy"),
    "empty": lambda entry: [path.unlink() for path in entry.iterdir()],
}


def pickled(path: Path) -> None:
    """Objects in a file of the right size: reading them would run what they say."""
    size = path.stat().st_size
    np.save(path, np.array([Path("x")], dtype=object), allow_pickle=True)
    with path.open("ab") as file:
        file.write(b"\0" * (size - path.stat().st_size))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_written_again(recipe, tokenizer, encoded, folder, damage):
    made = recipe(("a.jsonl", ROWS))
    first = contents(load_data(made, tokenizer))
    (entry,) = folder.iterdir()
    DAMAGE[damage](entry)
    assert contents(load_data(made, tokenizer)) == first
    assert encoded == [40, 40]
    assert contents(load_data(made, tokenizer)) == first
    assert encoded == [40, 40]
    assert [path.name for path in folder.iterdir()] == [entry.name]


def test_arrays_that_do_not_fit_each_other_are_damaged(recipe, tokenizer, encoded, folder):
    load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    (one,) = folder.iterdir()
    load_data(recipe(("b.jsonl", ROWS[::-1])), tokenizer)
    other = next(path for path in folder.iterdir() if path != one)
    load_data(recipe(("c.jsonl", ROWS[:30])), tokenizer)
    short = next(path for path in folder.iterdir() if path not in (one, other))
    shutil.copy(short / "ids.npy", one)
    written = json.loads((one / FACTS).read_text())
    written["sizes"]["ids.npy"] = (one / "ids.npy").stat().st_size
    (one / FACTS).write_text(json.dumps(written))
    load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    assert encoded == [40, 40, 30, 40]


def test_a_cache_that_cannot_be_written_is_said_and_no_error(recipe, tokenizer, encoded, tmp_path, monkeypatch):
    made = recipe(("a.jsonl", ROWS), ("b.jsonl", ROWS[:10]))
    expected = contents(load_data(made, tokenizer))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TUNE_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        data = load_data(made, tokenizer)
        assert contents(data) == expected
        assert f"{tmp_path}/file/below/data: Not a directory" in data.report.cache_problem
        (said,) = (words for words in data.report.warnings() if "not kept" in words)
        assert "Set TUNE_CACHE to a folder that can be written to" in said
    assert encoded == [40, 10] * 3
    assert list((tmp_path / "temporary").iterdir()) == [], "a temporary folder was left behind"


def test_a_disk_that_fills_up_is_no_error_as_long_as_there_is_another(recipe, tokenizer, folder, tmp_path, monkeypatch):
    made = recipe(("a.jsonl", ROWS))
    expected = contents(load_data(made, tokenizer))
    shutil.rmtree(folder)
    full = [folder]
    add = Writer.add

    def adding(self, *arrays):
        if any(self.folder.is_relative_to(disk) for disk in full):
            self._files["ids"].write = refusing
        add(self, *arrays)

    def refusing(raw):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Proxy:
        """A file whose `write` can be replaced."""

        def __init__(self, file):
            self.file, self.write = file, file.write

        def __getattr__(self, name):
            return getattr(self.file, name)

    enter = Writer.__enter__

    def entering(self):
        enter(self)
        self._files = {name: Proxy(file) for name, file in self._files.items()}
        return self

    monkeypatch.setattr(Writer, "__enter__", entering)
    monkeypatch.setattr(Writer, "add", adding)
    data = load_data(made, tokenizer)
    assert contents(data) == expected
    assert data.report.cache_problem.endswith("No space left on device")
    assert list(folder.iterdir()) == []
    full.append(tmp_path / "temporary")
    (said,) = problems(made, tokenizer)
    assert "No space left on device: there is no place for the encoded examples" in said
    assert "TUNE_CACHE or TMPDIR" in said
    assert [*folder.iterdir(), *(tmp_path / "temporary").iterdir()] == []


def test_an_account_without_a_home_has_no_cache(recipe, tokenizer, monkeypatch):
    monkeypatch.delenv("TUNE_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    assert Cache().problem == "no home"
    assert Cache(keep=False).problem is None


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Cache().folder == tmp_path / "cache" / "data"
    monkeypatch.setenv("TUNE_CACHE", "")
    assert Cache().folder == tmp_path / "xdg" / "tune" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache().folder == tmp_path / ".cache" / "tune" / "data"


def test_entries_of_long_ago_are_removed_when_one_is_written(recipe, tokenizer, encoded, folder):
    old, used, new = (
        recipe((f"{name}.jsonl", rows)) for name, rows in zip("abc", (ROWS, ROWS[:9], ROWS[:7]), strict=True)
    )
    entries = []
    for made in (old, used):
        load_data(made, tokenizer)
        entries.append(next(path for path in folder.iterdir() if path not in entries))
    unfinished, lock = folder / ".writing-1", folder / "x.lock"
    unfinished.mkdir()
    lock.write_text("")
    before = time.time() - (KEPT_DAYS + 1) * 24 * 3600
    for path in (*(entry / FACTS for entry in entries), unfinished, lock):
        os.utime(path, (before, before))
    load_data(used, tokenizer)  # which is why it stays
    assert all(entry.exists() for entry in entries)
    load_data(new, tokenizer)
    assert [entry.exists() for entry in entries] == [False, True]
    assert len(list(folder.iterdir())) == 2
    load_data(old, tokenizer)
    assert encoded == [40, 9, 7, 40]


def test_what_somebody_is_writing_stays(recipe, tokenizer, folder):
    (folder / ".writing-1").mkdir(parents=True)
    load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    assert (folder / ".writing-1").exists()


def test_preview_leaves_nothing(recipe, tokenizer, folder, tmp_path, capsys):
    made = recipe(("a.jsonl", ROWS))
    base = fixture_path("models/stories260K-mistral")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: {base}}}\ndata: {{train: {made.data.train[0].path}, template: alpaca}}\noutput: {tmp_path}/r\n"
    )
    preview(str(path), [], 2, as_json=True, quiet=True)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert not folder.exists()
    assert list((tmp_path / "temporary").iterdir()) == []


def test_check_says_what_was_cached(recipe, tmp_path, capsys):
    made = recipe(("a.jsonl", ROWS), ("b.jsonl", ROWS[:10]))
    base, paths = fixture_path("models/stories260K-mistral"), [source.path for source in made.data.train]
    path = tmp_path / "recipe.yaml"

    def checked(*sources: str) -> list[str]:
        values = f"data: {{train: {json.dumps(sources)}, template: alpaca}}\noutput: {tmp_path}/r\n"
        path.write_text(f"model: {{base: {base}}}\n{values}")
        check(str(path), [], quiet=True)
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith("cached")]

    assert checked(paths[0]) == []
    assert checked(*paths) == ["cached       1 of 2 sources, encoded by an earlier start"]
    assert checked(*paths) == ["cached       2 of 2 sources, encoded by an earlier start"]


def test_what_is_refused_is_refused_in_the_same_words_again(recipe, tokenizer, encoded, folder):
    long = [*ROWS, {"instruction": "x", "output": "word " * 300}]
    for rows, options, count in (
        (long, {"max_length": 200, "on_long": "error"}, 1),
        ([*ROWS, {"instruction": "word " * 300, "output": "x"}], {"max_length": 200}, 2),
    ):
        made = recipe(("a.jsonl", rows), **options)
        first = problems(made, tokenizer)
        assert "a.jsonl:41: " in first[0]
        assert problems(made, tokenizer) == first
        assert encoded == [41] * count
    kept = list(folder.iterdir())
    bad = ("b.jsonl", [*ROWS[:5], {"instruction": "x"}])
    made = recipe(("a.jsonl", ROWS), bad, ("c.jsonl", ROWS[:8]), ("d.jsonl", [*ROWS[:5], 3]))
    said = problems(made, tokenizer)
    assert [line.rpartition("/")[2].partition(": ")[0] for line in said[:2]] == ["b.jsonl:6", "d.jsonl:6"]
    assert said[2].startswith("2 rows cannot be used.")
    assert problems(made, tokenizer) == said
    # What is whole is kept, and nothing is tokenised behind a row that is refused.
    assert encoded == [41, 41, 40]
    assert len(list(folder.iterdir())) == len(kept) + 1


def test_rows_are_streamed(recipe, tokenizer, monkeypatch):
    monkeypatch.setattr("tune.data.reading.CHUNK", 7)
    monkeypatch.setattr("tune.data.reading.LOOKED_AT", 5)
    made = recipe(("a.jsonl", ROWS))
    read, written, ahead = [0], [0], []
    from tune.data.sources import Opened

    iterate, add = Opened.__iter__, Writer.add

    def counting(self):
        for row in iterate(self):
            read[0] += 1
            yield row

    def adding(self, ids, trained, rows):
        ahead.append(read[0] - written[0])
        written[0] += len(rows)
        add(self, ids, trained, rows)

    monkeypatch.setattr(Opened, "__iter__", counting)
    monkeypatch.setattr(Writer, "add", adding)
    load_data(made, tokenizer)
    assert (read[0], written[0]) == (40, 40)
    assert max(ahead) == 7


def test_only_the_first_wrong_rows_are_remembered_whatever_order_they_come_in():
    tally = Tally()
    for number in (9, 4, 7, 1, 8, 2, 100):
        tally.add(Place(0, number), f"wrong {number}")
    tally.add(Place(1, 0), "of the next file")
    assert tally.count == 8
    assert [place.number for place, _ in tally.first] == [1, 2, 4]
    facts = Facts("alpaca", bad=tally, mended={"joined": 2})
    assert Facts.of_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_a_source_of_which_nothing_is_kept_has_an_entry(recipe, tokenizer, encoded):
    made = recipe(("a.jsonl", ROWS), ("b.jsonl", [{"instruction": "word " * 400, "output": "x"}]), on_bad="drop")
    made = made.model_copy(update={"data": made.data.model_copy(update={"max_length": 200})})
    first = load_data(made, tokenizer)
    assert contents(load_data(made, tokenizer)) == contents(first)
    assert encoded == [40, 1]
    assert first.report.sources[1].dropped_untrained == 1


def test_stored_arrays_are_mapped_and_cannot_be_written_to(recipe, tokenizer, folder):
    data = load_data(recipe(("a.jsonl", ROWS)), tokenizer)
    ids, trained = data.train.example(5)
    shutil.rmtree(folder)
    assert tokenizer.decode(ids[trained]) == "It is 5, I say.</s>"
    for array in (ids, trained):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    stored = data.train.stored[0]
    chosen = data.train.select(np.arange(3))
    assert chosen.stored[0].ids is stored.ids
    base = stored.ids
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert type(base).__name__ == "mmap"


def test_written_in_pieces_is_written_whole(tmp_path):
    rows = np.zeros(5, dtype=ROW)
    rows["end"] = [2, 4, 6, 8, 10]
    ids, trained = np.arange(10, dtype=np.int32), np.arange(10) % 2 == 0
    with Writer(tmp_path) as writer:
        for start, end in ((0, 1), (1, 1), (1, 4), (4, 5)):
            writer.add(ids[2 * start : 2 * end], trained[2 * start : 2 * end], rows[start:end])
        writer.finish(Facts("alpaca", tokens=10))
    _, stored = read_stored(tmp_path, lambda file, number: "")
    assert stored.ids.tolist() == ids.tolist()
    assert stored.trained.tolist() == trained.tolist()
    assert (stored.rows == rows).all()
    assert stored.rows.dtype == ROW


PROCESS = """
import sys, time
from pathlib import Path
from tune.data.encode import Encoder
from tune.data.load import load_data
from tune.data.tokenizer import load_tokenizer
from tune.recipe.load import load_recipe

encode = Encoder.encode
def slow(self, prompts):
    with open(sys.argv[2], "a") as file:
        file.write(f"{len(prompts)}\\n")
    time.sleep(0.5)
    return encode(self, prompts)
Encoder.encode = slow
tokenizer = load_tokenizer(sys.argv[3])
recipe = load_recipe({"model": {"base": "x"}, "data": {"train": sys.argv[1], "template": "alpaca"}, "output": "r"})
print("ready", flush=True)
input()
print(load_data(recipe, tokenizer).fingerprint)
"""


def test_processes_that_want_the_same_entry_write_it_once(recipe, tokenizer, folder, tmp_path):
    made = recipe(("a.jsonl", ROWS))
    log, base = tmp_path / "log", str(fixture_path("models/stories260K-mistral"))
    command = [sys.executable, "-c", PROCESS, made.data.train[0].path, str(log), base]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0].strip() for process in processes]
    assert log.read_text().split() == ["40"]
    assert said == [load_data(made, tokenizer).fingerprint] * 2
    assert len(list(folder.iterdir())) == 1, "a lock or an unfinished entry was left behind"


def test_the_fingerprint_is_of_tokens_masks_sources_and_order(recipe, tokenizer):
    halves = (ROWS[:20], ROWS[20:])
    texts = [
        load_data(recipe(*sources, **options), tokenizer).fingerprint
        for sources, options in (
            ([("a.jsonl", ROWS)], {}),
            ([("a.jsonl", ROWS[::-1])], {}),
            ([("a.jsonl", ROWS[:-1])], {}),
            ([("a.jsonl", ROWS)], {"train_on": "all"}),
            ([("a.jsonl", ROWS)], {"eval": 0.3}),
            ([("a.jsonl", halves[0]), ("b.jsonl", halves[1])], {}),
            ([("a.jsonl", halves[1]), ("b.jsonl", halves[0])], {}),
        )
    ]
    assert len(set(texts)) == len(texts)


def test_digests_are_of_the_content_alone(recipe, tokenizer):
    data = load_data(recipe(("a.jsonl", [*ROWS, ROWS[2]])), tokenizer)
    plain = Examples.of([data.train.example(i)[0] for i in range(41)], [data.train.example(i)[1] for i in range(41)])
    assert plain.digests.tolist() == data.train.digests.tolist()
    assert plain.column("content").tolist() == data.train.column("content").tolist()
    assert (plain.tokens, plain.largest_id) == (data.train.tokens, data.train.largest_id)
    assert plain.trained_counts.tolist() == data.train.trained_counts.tolist()
    assert repeated(plain.digests) == 1
    assert [plain.where(0), plain.where(40)] == ["row 0", "row 40"]
    other = Examples.of([[1, 2, 3], [1, 2, 3]], [[False, True, True], [False, False, True]], source=[0, 1])
    assert other.digests[0].tolist() == other.digests[1].tolist()
    assert other.column("content")[0].tolist() != other.column("content")[1].tolist()
    assert other.source.tolist() == [0, 1]


def test_a_lock_removed_while_it_was_waited_for_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its holder removes it at the end: the next one to come makes another, which both must wait at."""
    import fcntl

    from tune.data import cache

    path, plain, taken = tmp_path / "entry.lock", fcntl.flock, []

    def flock(file: object, how: int) -> None:
        plain(file, how)  # type: ignore[arg-type]
        taken.append(how)
        if len(taken) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with cache._lock(path):
        assert len(taken) == 2
        assert path.exists()
    assert not path.exists()
