"""Files that cannot be read as rows: each told by its name and line, with what to do, before the weights are loaded."""

from __future__ import annotations

import gzip
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.data_mistakes import (
    DROP,
    ROW,
    after_a_good_one,
    assert_refused_by_check,
    assert_told_in_the_same_words,
    both,
    data,
    folder,
    source,
)
from tests.cli.mistakes import CHECK, Mistake, cut_in_half, mistake
from tune.cli.main import _run


def rename(work: Path) -> None:
    (work / "train.jsonl").rename(work / "trian.jsonl")


def gz(content: bytes, keep: int | None = None) -> Callable[[Path], object]:
    return data(gzip.compress(content, mtime=0)[:keep], "train.jsonl.gz")


def gz_damaged(work: Path) -> None:
    packed = bytearray(gzip.compress(ROW.encode() * 50, mtime=0))
    packed[-8:-4] = b"\0\0\0\0"
    (work / "train.jsonl.gz").write_bytes(packed)


def table(path: str, columns: dict[str, list[Any]]) -> Callable[[Path], object]:
    """A parquet file."""

    def put(work: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), work / path)

    return put


def link(path: str, to: str) -> Callable[[Path], object]:
    def put(work: Path) -> None:
        (work / path).unlink(missing_ok=True)
        (work / path).symlink_to(to)

    return put


def pipe(work: Path) -> None:
    os.mkfifo(work / "pipe.jsonl")


def plug(work: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("plug.jsonl")


FILES = [
    mistake("missing", "train.jsonl: there is no such file", "Did you mean 'trian.jsonl'?", prepare=rename),
    mistake("missing folder", "dta/train.jsonl", "no folder 'dta'", data__train="dta/train.jsonl"),
    mistake("held-out missing", "evl.jsonl: there is no such file", data__eval=["evl.jsonl"]),
    mistake("second source missing", "more.jsonl: there is no such file", data__train=["train.jsonl", "more.jsonl"]),
    mistake("nobody's home", "~nobody-at-all/a.jsonl", data__train="~nobody-at-all/a.jsonl"),
    mistake("path with a null character", "is no path", data__train="a\0b.jsonl"),
    mistake("path too long", "File name too long", data__train="x" * 300 + ".jsonl"),
    mistake("dangling link", "gone.jsonl", prepare=link("gone.jsonl", "nowhere"), data__train="gone.jsonl"),
    mistake("link in a circle", "loop.jsonl", prepare=link("loop.jsonl", "loop.jsonl"), data__train="loop.jsonl"),
    mistake("empty", "train.jsonl: is empty", prepare=data("")),
    mistake("white space only", "train.jsonl: is empty", prepare=data(" \n\n")),
    mistake("not UTF-8", "train.jsonl:2: is not UTF-8 (byte 0xff)", prepare=data(ROW.encode() + b'{"a": "\xff"}\n')),
    mistake("UTF-16", "train.jsonl: is UTF-16, not UTF-8", "as UTF-8", prepare=data(ROW.encode("utf-16"))),
    mistake("binary", "train.jsonl", "is not", prepare=data(bytes(range(256)) * 20)),
    mistake("wrong ending", "train.xlsx", ".csv", prepare=data("x", "train.xlsx"), data__train="train.xlsx"),
    mistake("no ending", "rows", ".jsonl", prepare=data(ROW, "rows"), data__train="rows"),
    mistake("zip", "train.zip", "Unpack it", prepare=data(b"PK\3\4", "train.zip"), data__train="train.zip"),
    mistake("a folder of no data", "base: ", "base", data__train="base"),
    mistake("an empty folder", "nothing: ", prepare=folder("nothing"), data__train="nothing"),
    mistake("a folder named as a file", "odd.jsonl: ", prepare=folder("odd.jsonl"), data__train="odd.jsonl"),
    mistake("a pattern that nothing fits", "more*.jsonl", data__train="more*.jsonl"),
    mistake("a pipe", "pipe.jsonl: ", prepare=pipe, data__train="pipe.jsonl"),
    mistake("a socket", "plug.jsonl: ", prepare=plug, data__train="plug.jsonl"),
    mistake("a device", "train.jsonl: ", prepare=link("train.jsonl", "/dev/zero")),
    mistake("a file that fails", "train.jsonl: ", prepare=link("train.jsonl", "/proc/self/mem")),
    mistake(
        "gzip cut off",
        "train.jsonl.gz: ends in the middle",
        prepare=gz(ROW.encode() * 99, 40),
        data__train="train.jsonl.gz",
    ),
    mistake("no gzip", "train.jsonl.gz", "gzip", prepare=data(ROW, "train.jsonl.gz"), data__train="train.jsonl.gz"),
    mistake("gzip of nothing", "train.jsonl.gz: is empty", prepare=gz(b""), data__train="train.jsonl.gz"),
    mistake("no zstandard", "a.jsonl.zst", "zst", prepare=data(ROW, "a.jsonl.zst"), data__train="a.jsonl.zst"),
    mistake("gzip damaged", "train.jsonl.gz", "damaged", prepare=gz_damaged, data__train="train.jsonl.gz"),
    mistake(
        "packed under another name",
        "train.jsonl: is packed with gzip",
        ".gz",
        prepare=data(gzip.compress(ROW.encode())),
    ),
    mistake("a pickle", "a.pkl", "run code", prepare=data(b"\x80\x04", "a.pkl"), data__train="a.pkl"),
    mistake("text without columns", "a.txt", '{"text": "..."}', prepare=data("hello\n", "a.txt"), data__train="a.txt"),
    mistake("an address", "https://a.com/b.jsonl: is an address", "Fetch it", data__train="https://a.com/b.jsonl"),
    mistake("an address on the Hub", "Write the data set's id: a/b", data__train="https://huggingface.co/datasets/a/b"),
    mistake("a name without owner", "alpaca: there is no such file", "OWNER/NAME", data__train="alpaca"),
    mistake(
        "a folder of folders",
        "d: is a folder",
        "d/train",
        prepare=both(folder("d"), data(ROW, "d/train/a.jsonl")),
        data__train="d",
    ),
    mistake(
        "a bad file in a folder",
        "d/b.jsonl:1: is not valid JSON",
        prepare=both(data(ROW, "d/a.jsonl"), data("{oops\n", "d/b.jsonl")),
        data__train="d",
        lines=2,
    ),
    mistake("split of a file", "split:", "Remove it", data__train=source(split="train")),
    mistake("config of a file", "config:", "Remove it", data__train=source(config="main")),
    mistake("revision of a file", "revision:", "Remove it", data__train=source(revision="main")),
    mistake("data set out of reach", "someone/some-data", "HF_HUB_OFFLINE", data__train="someone/some-data"),
    mistake("data set for held-out out of reach", "a/b", "HF_HUB_OFFLINE", data__eval=["a/b"]),
]

JSON = [
    mistake("broken line", "train.jsonl:3: is not valid JSON", DROP, prepare=data(ROW * 2 + "{oops\n"), lines=2),
    mistake("broken array", "train.jsonl:2: is not valid JSON", prepare=data('[{"instruction": "a",\n "output')),
    mistake(
        "array cut off",
        "a.json:",
        "is not valid JSON",
        prepare=both(data(f"[{ROW},{ROW}]", "a.json"), cut_in_half("a.json")),
        data__train="a.json",
    ),
    mistake("text after the array", "a.json:2", prepare=data(f"[{ROW}] and more", "a.json"), data__train="a.json"),
    mistake("an array of nothing", "a.json: ", "is empty", prepare=data("[]", "a.json"), data__train="a.json"),
    mistake("one object", "holds one object", "'rows'", prepare=data('{"a": 1,\n "rows": [1, 2]}')),
    mistake("lines under .json in an array", "a.json", prepare=data("[1, 2, 3]", "a.json"), data__train="a.json"),
    mistake(
        "not a number",
        "train.jsonl:2: is not valid JSON (it holds NaN",
        prepare=after_a_good_one('{"instruction": "a", "output": NaN}'),
        lines=2,
    ),
    mistake(
        "nested too deeply", "train.jsonl:2", "nested too deeply", prepare=after_a_good_one("[" * 100_000), lines=2
    ),
    mistake(
        "an integer too long to read",
        "train.jsonl:2",
        prepare=after_a_good_one('{"instruction": "a", "output": "b", "id": ' + "9" * 5000 + "}"),
        lines=2,
    ),
    mistake(
        "a tab in a string",
        "train.jsonl:2: is not valid JSON",
        prepare=after_a_good_one('{"instruction": "a\tb"}'),
        lines=2,
    ),
    mistake(
        "single quotes", "train.jsonl:2: is not valid JSON", prepare=after_a_good_one("{'instruction': 'a'}"), lines=2
    ),
    mistake(
        "half a surrogate pair",
        "train.jsonl:2",
        "U+D83D",
        prepare=after_a_good_one(r'{"instruction": "a", "output": "\ud83d"}'),
        lines=2,
    ),
    mistake(
        "a key twice",
        "train.jsonl:2: ",
        '"output" twice',
        prepare=after_a_good_one('{"instruction": "a", "output": "b", "output": "c"}'),
        lines=2,
    ),
    mistake(
        "a list in a list", "a.json:1: is no object but [{", prepare=data(f"[[{ROW}]]", "a.json"), data__train="a.json"
    ),
    mistake("row no object", "train.jsonl:2: is no object but [1, 2]", prepare=after_a_good_one([1, 2]), lines=2),
    mistake("row of text", 'train.jsonl:2: is no object but "hello"', prepare=after_a_good_one('"hello"'), lines=2),
    mistake("row null", "train.jsonl:2: is no object but null", prepare=after_a_good_one("null"), lines=2),
]

TABLES = [
    mistake("csv without header", "a.csv", "b c d", prepare=data("a,b c d\nb,c\n", "a.csv"), data__train="a.csv"),
    mistake(
        "csv ragged",
        "a.csv:3",
        prepare=data("instruction,output\na,b\na,b,c,d\n", "a.csv"),
        data__train="a.csv",
        lines=2,
    ),
    mistake(
        "csv with a quote left open",
        "a.csv:",
        prepare=data('instruction,output\na,b\n"a,b\n', "a.csv"),
        data__train="a.csv",
    ),
    mistake(
        "csv of a header alone", "a.csv", "is empty", prepare=data("instruction,output\n", "a.csv"), data__train="a.csv"
    ),
    mistake("csv empty", "a.csv: is empty", prepare=data("", "a.csv"), data__train="a.csv"),
    mistake(
        "csv with a column twice",
        "a.csv",
        "'output'",
        prepare=data("instruction,output,output\na,b,c\n", "a.csv"),
        data__train="a.csv",
    ),
    mistake(
        "csv not UTF-8",
        "a.csv:2: is not UTF-8",
        prepare=data(b"instruction,output\na,\xff\n", "a.csv"),
        data__train="a.csv",
    ),
    mistake(
        "no parquet", "a.parquet: cannot be read as Parquet", prepare=data(ROW, "a.parquet"), data__train="a.parquet"
    ),
    mistake(
        "parquet cut off",
        "a.parquet",
        prepare=both(table("a.parquet", {"instruction": ["a"], "output": ["b"]}), cut_in_half("a.parquet")),
        data__train="a.parquet",
    ),
    mistake(
        "parquet without rows",
        "a.parquet",
        "no rows",
        prepare=table("a.parquet", {"instruction": []}),
        data__train="a.parquet",
    ),
    mistake(
        "parquet of numbers",
        "a.parquet[0]: 'output' is a number",
        prepare=table("a.parquet", {"instruction": ["a"], "output": [1]}),
        data__train=source("a.parquet", format="alpaca"),
    ),
    mistake(
        "parquet with a null",
        "a.parquet[1]: 'output' is null",
        prepare=table("a.parquet", {"instruction": ["a", "b"], "output": ["c", None]}),
        data__train="a.parquet",
        lines=2,
    ),
    mistake("no arrow", "a.arrow: cannot be read as Arrow", prepare=data(ROW, "a.arrow"), data__train="a.arrow"),
]

MISTAKES = [*FILES, *JSON, *TABLES]


@pytest.mark.parametrize("wrong", MISTAKES)
def test_refused(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_refused_by_check(wrong, work, capfd)


@pytest.mark.parametrize("wrong", MISTAKES[::6])
def test_training_says_the_same(wrong: Mistake, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert_told_in_the_same_words("train", wrong, work, capfd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.chmod("train.jsonl", 0)
    assert _run(list(CHECK)) == 2
    said = capfd.readouterr().err
    assert said.startswith("train.jsonl: cannot be read (Permission denied)")
    assert len(said.splitlines()) == 1
