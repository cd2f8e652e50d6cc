"""Recipes and data made to do harm: each ends in one message or in rows, in seconds, in bounded memory."""

from __future__ import annotations

import csv
import gzip
import json
import os
import random
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.security.limited import Ended, assert_one_message, limited
from tune.data.sources import BadRow, open_source
from tune.data.sources import patterns as patterns_module
from tune.data.sources.patterns import expanded
from tune.errors import RecipeError
from tune.recipe.load import load_recipe
from tune.recipe.read import MAX_PROBLEMS
from tune.recipe.schema import Source

BASE = "model:\n  base: x\ndata:\n  train: y\n"
RUN = "['touch MARK']"


def laughs() -> str:
    """A billion values in a few lines."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"{two}: &{two} [{', '.join([f'*{one}'] * 10)}]" for one, two in pairwise("abcdefghijklm")]
    return "\n".join(lines)


TEXTS: dict[str, tuple[str | bytes, str]] = {
    "a billion laughs": (laughs(), "more than 10000 values"),
    "aliases in a circle": ("a: &a\n  b: *a\n", "nested in itself"),
    "merge keys": ("a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "no merge keys"),
    "nested flow lists": ("a: " + "[" * 100_000, "nested too deeply"),
    "nested block lists": ("- " * 100_000, "nested too deeply"),
    "nested questions": ("? " * 100_000, "nested too deeply"),
    "nested mappings": ("".join(" " * i + "a:\n" for i in range(600)), "nested too deeply"),
    "many values": ("a: [" + "[]," * 50_000 + "]", "more than 10000 values"),
    "many keys": ("".join(f"k{i}: 1\n" for i in range(20_000)), "more than 10000 values"),
    "ten megabytes": ("a: " + "x" * (10 << 20), "larger than 256 KiB"),
    "a call": (f"{BASE}x: !!python/object/apply:os.system {RUN}\n", "tag has no meaning"),
    "an object": (f"{BASE}x: !!python/object/new:subprocess.Popen {RUN}\n", "tag has no meaning"),
    "a name": (f"{BASE}x: !!python/name:os.system\n", "tag has no meaning"),
    "a module": (f"{BASE}x: !!python/module:antigravity\n", "tag has no meaning"),
    "a call under another name": (f"%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nx: !os.system {RUN}\n", "tag"),
    "bytes": (f"{BASE}x: !!binary aGk=\n", "tag has no meaning"),
    "a file": (f"{BASE}x: !include /etc/passwd\n", "tag has no meaning"),
    "a variable": (f"{BASE}x: !ENV HOME\n", "tag has no meaning"),
    "a set": (f"{BASE}x: !!set {{a}}\n", "tag has no meaning"),
    "two documents": (f"{BASE}---\n{BASE}", "another document"),
    "another YAML": (f"%YAML 9.9\n---\n{BASE}", "not valid YAML"),
    "zero character": (f"{BASE}x: \0\n", "not text"),
    "escape of no character": (f'{BASE}x: "\\UFFFFFFFF"\n', "escape"),
    "Latin": (b"a: \xe9\n", "not text in UTF-8"),
    "UTF-16": (BASE.encode("utf-16"), "not text in UTF-8"),
    "Python's inside": (f"{BASE}__class__: os\n", "__class__"),
    "integer of many digits": (f"{BASE}adapter: {{rank: {'9' * 100_000}}}\n", "must be a whole number"),
    "integer beyond": (f"{BASE}adapter: {{rank: 1e400}}\n", "must be a whole number"),
    "float of many digits": (f"{BASE}train: {{learning_rate: {'9' * 100_000}}}\n", "must be a finite number"),
    "hexadecimal": (f"{BASE}train: {{seed: 0x{'f' * 100_000}}}\n", "must be a whole number"),
    "sexagesimal": (f"{BASE}train: {{seed: {'1:' * 50_000}1}}\n", "must be a whole number"),
    "not a number": (f"{BASE}train: {{learning_rate: .nan}}\n", "learning_rate"),
}


def read(path: str, *overrides: str) -> Ended:
    return limited(lambda: load_recipe(path, overrides))


@pytest.fixture(scope="module", autouse=True)
def _imported() -> None:
    """What is imported here, no child need import."""
    load_recipe({"model": {"base": "x"}, "data": {"train": "y"}})
    import pyarrow.parquet  # noqa: F401


@pytest.mark.parametrize("name", TEXTS)
def test_a_recipe_is_refused(name: str, tmp_path: Path) -> None:
    text, words = TEXTS[name]
    content = text if isinstance(text, bytes) else text.replace("MARK", str(tmp_path / "mark")).encode()
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    started = time.monotonic()
    ended = read(str(path))
    assert ended.code == 2, ended
    assert words in ended.said, ended
    assert all(line.startswith(str(path)) for line in ended.said.splitlines())
    assert (ended.opened, ended.noise) == ((), "")
    assert ended.grown < 200 << 20
    assert time.monotonic() - started < 15
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["a billion laughs", "nested flow lists", "a call", "a file", "aliases in a circle"])
def test_an_override_is_refused(name: str, tmp_path: Path) -> None:
    text = TEXTS[name][0]
    assert isinstance(text, str)
    (tmp_path / "recipe.yaml").write_text(BASE)
    value = text.removeprefix(BASE).removeprefix("x: ").replace("MARK", str(tmp_path / "mark"))
    ended = read(str(tmp_path / "recipe.yaml"), f"adapter.ranks={value}")
    assert ended.code == 2, ended
    assert "(command line)" in ended.said
    assert not (tmp_path / "mark").exists()


def test_a_file_that_is_wrong_throughout_is_not_told_throughout(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    for text in ("".join(f"k{i}: 1\n" for i in range(9000)), "a: 1\n" * 20_000):
        path.write_text(text)
        started = time.process_time()
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert MAX_PROBLEMS < len(caught.value.problems) < MAX_PROBLEMS + 5
        assert "more" in caught.value.problems[-1]
        assert time.process_time() - started < 8


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_never_ends_is_no_recipe(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "recipe.yaml")
    assert_one_message(read(str(tmp_path / "recipe.yaml")), "is a pipe or a device")


def test_nothing_in_a_recipe_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s3cret")
    values = ("$SECRET", "${SECRET}", "%SECRET%", "$(id)", "`id`", "{{ SECRET }}", "${oc.env:SECRET}", "~")
    for value in values:
        (tmp_path / "recipe.yaml").write_text(f"model:\n  base: '{value}'\ndata:\n  train: '{value}'\n")
        recipe = load_recipe(tmp_path / "recipe.yaml")
        assert recipe.model.base == value
        assert recipe.data.train[0].path == value


def rows(path: Path | str, **options: Any) -> Ended:
    """Read a source to its end."""
    source = Source(path=str(path), **options)

    def work() -> tuple[int, int]:
        good = bad = 0
        for row in open_source(source):
            bad += isinstance(row, BadRow)
            good += not isinstance(row, BadRow)
        return good, bad

    return limited(work)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.json.gz", "rows.parquet"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_never_ends_is_no_data(name: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / name)
    assert_one_message(rows(tmp_path / name), "is no regular file")


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/stdin", "/dev/fd/0", "/proc/self/mem", "/etc/passwd", "a\0b.jsonl"]
)
def test_a_path_that_is_no_data_file_is_refused(path: str, tmp_path: Path) -> None:
    assert_one_message(rows(path))


def test_a_pattern_for_the_whole_machine_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in range(20):
        (tmp_path / f"{folder}").mkdir()
        for file in range(20):
            (tmp_path / f"{folder}/{file}.txt").touch()
    monkeypatch.setattr(patterns_module, "MOST", 300)
    for pattern in ("**", "**/*.jsonl", "*/*.jsonl", "**/**/a"):
        assert_one_message(rows(f"{tmp_path}/{pattern}"), "looks at more than", "folder that holds the rows")
    monkeypatch.setattr(patterns_module, "MOST", 1000)
    assert_one_message(rows(f"{tmp_path}/**/*.jsonl"), "matches no file")


def test_a_pattern_does_not_run_in_circles(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/round").symlink_to(tmp_path)
    (tmp_path / "a/b/x.jsonl").touch()
    assert expanded(f"{tmp_path}/**/*.jsonl") == [f"{tmp_path}/a/b/x.jsonl"]
    assert expanded(f"{tmp_path}/a/b/round/a/*/x.jsonl") == [f"{tmp_path}/a/b/round/a/b/x.jsonl"]


def test_patterns_match_what_glob_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glob

    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.jsonl", "c/d.json", "c/e/f.json", "c/.g/h.json", ".i/j.json", "c/[x].json", "k*/l.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for pattern in (
        *("*", "*.json", "**", "**/*.json", "c/**", "c/*/*.json", "?.json*", "[ab].*", "c/.g/*", ".i/*", "**/f.json"),
        *("c/**/f.json", "nothing/*", "*/", "c/[[]x].json", "k[*]/*", "**/e/**", "./*.json", "../*/a.*"),
    ):
        for prefix in ("", f"{tmp_path}/"):
            theirs = {path for path in glob.glob(prefix + pattern, recursive=True) if not os.path.isdir(path)}
            ours = {path for path in expanded(prefix + pattern) if not os.path.isdir(path)}
            assert {os.path.normpath(path) for path in ours} == {os.path.normpath(path) for path in theirs}, pattern


def packed(path: Path, piece: bytes, times: int) -> None:
    with gzip.open(path, "wb", 9) as file:
        for _ in range(times):
            file.write(piece)


@pytest.mark.parametrize("name", ["zeros.jsonl.gz", "zeros.json.gz", "zeros.parquet.gz", "zeros.arrow.gz"])
def test_an_archive_that_grows_without_measure_is_refused(name: str, tmp_path: Path) -> None:
    packed(tmp_path / name, b"\n" * (1 << 20), 400)
    assert (tmp_path / name).stat().st_size < 1 << 20
    assert_one_message(rows(tmp_path / name), "grows more than 250 times", "zeros")


def test_an_archive_of_zstandard_that_grows_without_measure_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    with pa.CompressedOutputStream(str(tmp_path / "zeros.jsonl.zst"), "zstd") as file:
        for _ in range(400):
            file.write(b"\n" * (1 << 20))
    assert_one_message(rows(tmp_path / "zeros.jsonl.zst"), "grows more than 2500 times")


def test_lines_of_nothing_are_not_read_for_ever(tmp_path: Path) -> None:
    packed(tmp_path / "zeros.csv.gz", b"\n" * (1 << 20), 20)
    assert_one_message(rows(tmp_path / "zeros.csv.gz"), "holds more than 5,000,000 blank lines")


def test_packed_rows_are_read_as_ever(tmp_path: Path) -> None:
    packed(tmp_path / "rows.jsonl.gz", b'{"a": "b"}\n' * 1000, 20)
    assert rows(tmp_path / "rows.jsonl.gz").said == "(20000, 0)"


@pytest.mark.parametrize(
    ("name", "beginning"),
    [("a.jsonl", b'{"a": "'), ("a.json", b'[{"a": "'), ("a.csv", b'a,b\n"'), ("b.csv", b"a,b\n"), ("c.csv", b"")],
)
def test_a_row_without_an_end_is_refused(name: str, beginning: bytes, tmp_path: Path) -> None:
    with (tmp_path / name).open("wb") as file:
        file.write(beginning)
        for _ in range(80):
            file.write(b"x" * (1 << 20))
    assert_one_message(rows(tmp_path / name), name, most=900 << 20)


def test_a_row_of_many_keys_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"k{i}": i for i in range(200_000)}) + "\n")
    ended = rows(tmp_path / "a.jsonl")
    assert ended.said == "(1, 0)"
    assert ended.grown < 300 << 20


def test_the_field_limit_of_the_process_is_not_raised_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    assert rows(tmp_path / "a.csv").said == "(1, 0)"
    assert csv.field_size_limit() <= 1 << 26


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "seed", [seed if seed < 2 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(12)]
)
def test_a_damaged_table_ends_in_rows_or_in_one_message(kind: str, seed: int, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"a": [f"text {i}" * 5 for i in range(2000)], "b": [[i, None] for i in range(2000)]})
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=500)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    whole = path.read_bytes()
    draw = random.Random(seed)
    for _ in range(12):
        content = bytearray(whole)
        tail = draw.random() < 0.7  # where a table says what it holds
        for _ in range(draw.randint(1, 8)):
            at = len(content) - draw.randint(1, min(2000, len(content))) if tail else draw.randrange(len(content))
            content[at] = draw.randrange(256)
        path.write_bytes(bytes(content))
        ended = rows(path)
        assert ended.code in (0, 2), ended
        assert ended.grown < 1 << 30
        if ended.code == 2:
            assert_one_message(ended, path.name, most=1 << 30)
