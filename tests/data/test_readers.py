"""Every kind of file, packed or not: the same rows, little memory, and no mistake that is not said."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tune.data.sources import KINDS, BadRow, Place, Row, open_source
from tune.data.sources.csv_rows import read_csv
from tune.data.sources.files import File
from tune.data.sources.json_rows import read_json
from tune.data.sources.lines import LONGEST
from tune.errors import DataError
from tune.recipe.schema import Source

ROWS = [
    {"instruction": "Say hello, please", "input": "", "output": "Hello!"},
    {"instruction": 'A "quoted" word\nand a second line', "input": "naïve 你好 🙂", "output": "x\u2028y\x85z"},
    {"instruction": "back\\slash \t tab", "input": "a;b", "output": "  spaces  "},
] * 3


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_list(rows: list[dict]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_csv(rows: list[dict], separator: str = ",") -> bytes:
    text = io.StringIO()
    table = csv.writer(text, delimiter=separator, lineterminator="\r\n")
    table.writerow(rows[0])
    table.writerows(row.values() for row in rows)
    return text.getvalue().encode()


def as_tsv(rows: list[dict]) -> bytes:
    return as_csv(rows, "\t")


def as_parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=2)
    return sink.getvalue()


def as_arrow(rows: list[dict], stream: bool = False) -> bytes:
    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue()


def as_arrow_stream(rows: list[dict]) -> bytes:
    return as_arrow(rows, stream=True)


WRITERS = {
    ".jsonl": [as_lines, as_list],
    ".json": [as_list, as_lines],
    ".ndjson": [as_lines],
    ".csv": [as_csv],
    ".tsv": [as_tsv],
    ".parquet": [as_parquet],
    ".arrow": [as_arrow, as_arrow_stream],
}
PACKERS = {
    "": lambda content: content,
    ".gz": lambda content: gzip.compress(content, mtime=0),
    ".zst": lambda content: pa.compress(content, codec="zstd", asbytes=True),
}


def rows_of(path: Path, **options) -> list[Row | BadRow]:
    return list(open_source(Source(path=str(path), **options)))


def written(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, **options) -> str:
    with pytest.raises(DataError) as caught:
        rows_of(path, **options)
    assert len(caught.value.problems) == 1
    said = str(caught.value)
    assert said.startswith(str(path))
    return said.removeprefix(str(path))


def bad(path: Path) -> list[tuple[int, str]]:
    return [(row.place.number, row.reason) for row in rows_of(path) if isinstance(row, BadRow)]


# The contract


def test_the_contract_covers_every_kind():
    assert {*WRITERS} == {*KINDS}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(("ending", "write"), [(e, w) for e, writers in WRITERS.items() for w in writers])
def test_every_kind_gives_the_same_rows(tmp_path, ending, write, packing):
    path = written(tmp_path, f"a{ending}{packing}", PACKERS[packing](write(ROWS)))
    opened = open_source(Source(path=str(path)))
    rows = list(opened)
    assert [row.value for row in rows] == ROWS
    assert all(type(row) is Row for row in rows)
    assert [row.place for row in opened] == [row.place for row in rows]  # it may be read again
    numbers = [row.place.number for row in rows]
    plain = write(ROWS).decode().split("\n") if KINDS[ending].by_line else []
    if not plain:
        assert numbers == [*range(len(ROWS))]
        assert opened.where(rows[1].place) == f"{path}[1]"
    else:
        starts = {as_lines: '{"instruction"', as_list: " {"}.get(write)
        wanted = (
            [n for n, line in enumerate(plain, 1) if line.startswith(starts)]
            if starts
            else [2, 3, 5] + [n + add for add in (4, 8) for n in (2, 3, 5)]
        )
        assert numbers == wanted
        assert opened.where(rows[1].place) == f"{path}:{numbers[1]}"
    assert [row.value for row in rows_of(path, limit=4)] == ROWS[:4]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_packed_file_of_several_members_is_one_file(tmp_path, packing):
    pack = PACKERS[packing]
    path = written(tmp_path, f"a.jsonl{packing}", pack(as_lines(ROWS[:2])) + pack(as_lines(ROWS[2:])))
    assert [row.value for row in rows_of(path)] == ROWS


def test_nested_columns_are_lists_and_objects(tmp_path):
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None}], "n": 3}] * 3
    for name, write in (("a.parquet", as_parquet), ("a.arrow", as_arrow), ("a.jsonl", as_lines)):
        assert [row.value for row in rows_of(written(tmp_path, name, write(chat)))] == chat


def test_json_texts_of_an_arrow_table_are_parsed(tmp_path):
    texts = pa.array(['{"a": [1, "x"]}', None, "[2]"], pa.json_())
    deep = pa.ListArray.from_arrays(pa.array([0, 1, None, 1]), pa.array(["1", "{}"], pa.json_()))
    table = pa.table({"tools": texts, "deep": deep, "text": ["{}"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.value for row in rows_of(tmp_path / "a.parquet")] == [
        {"tools": {"a": [1, "x"]}, "deep": [1], "text": "{}"},
        {"tools": None, "deep": [], "text": "{}"},
        {"tools": [2], "deep": None, "text": "{}"},
    ]


# JSON


def test_json_lines_say_their_lines(tmp_path):
    path = written(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n  {"a": "x\xe2\x80\xa8y"}  \n{"a": 2}')
    assert rows_of(path) == [
        Row({"a": 1}, Place(0, 1)),
        Row({"a": "x\u2028y"}, Place(0, 4)),
        Row({"a": 2}, Place(0, 5)),
    ]


def test_elements_say_the_line_on_which_they_start(tmp_path):
    path = written(tmp_path, "a.json", '\n\n[\n {"a": 1}, {"a": 2},\n\n {"a":\n 3}\n]\n')
    assert [(row.value["a"], row.place.number) for row in rows_of(path)] == [(1, 4), (2, 4), (3, 6)]


JUDGED = {
    "[1, 2]": "is no object but [1, 2]",
    '"text"': 'is no object but "text"',
    '"' + "x" * 99 + '"': 'is no object but "' + "x" * 36 + "...",
    '{"a": NaN}': "is not valid JSON (it holds NaN; where nothing is known, write null)",
    '{"a": [-Infinity]}': "is not valid JSON (it holds -Infinity; where nothing is known, write null)",
    '{"a": 1, "b": {"c": 1, "c": 1}}': 'has the key "c" twice in one object',
    '{"a": ' + "7" * 5000 + "}": "holds a number of 5000 digits",
    '{"a": "\\ud83d"}': "holds half a surrogate pair (U+D83D), which is no character",
    '{"a": "\\ude00\\ud83d\\ude00"}': "holds half a surrogate pair (U+DE00), which is no character",
    '{"a": "\\\\ud83d\\ude00"}': "holds half a surrogate pair (U+DE00), which is no character",
    '{"\\udfff": 1}': "holds half a surrogate pair (U+DFFF), which is no character",
    '"\\udfff"': 'is no object but "\\udfff"',
}
ACCEPTED = ['{"a": "\\ud83d\\ude00"}', '{"a": "\\\\ud83d"}', '{"a": 1.5e3, "b": null}', "{}", '{"a": {"a": {"a": 1}}}']


@pytest.mark.parametrize(("text", "reason"), JUDGED.items(), ids=range(len(JUDGED)))
def test_what_is_no_row_is_set_aside_in_lines_and_in_lists(tmp_path, text, reason):
    good = '{"a": 0}'
    for content in (
        f"{good}\n{text}\n{good}\n",
        f"[{good},\n{text},\n{good}]",
        f"{text}\n{good}\n",
        f"[\n{text}, {good}]",
    ):
        if content.startswith("[1, 2]\n"):
            continue  # a file that begins with a list is that list
        rows = rows_of(written(tmp_path, "a.json", content))
        assert [row.reason for row in rows if isinstance(row, BadRow)] == [reason]
        assert [row.value for row in rows if isinstance(row, Row)] == [{"a": 0}] * (len(rows) - 1)
        assert [row.place.number for row in rows] == ([1, 2, 3][: len(rows)] if content[1] != "\n" else [2, 2])


@pytest.mark.parametrize("text", ACCEPTED)
def test_what_is_a_row_is_taken_as_it_is(tmp_path, text):
    for content in (f"{text}\n", f"[{text}]"):
        assert [row.value for row in rows_of(written(tmp_path, "a.json", content))] == [json.loads(text)]


def test_a_broken_line_is_set_aside_and_a_broken_list_refused(tmp_path):
    lines = written(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n{"a": 2} {}\n' + "[" * 100_000 + '\n{"a": 3}\n\0\n')
    assert bad(lines) == [
        (2, "is not valid JSON (Expecting value, column 6)"),
        (3, "is not valid JSON (Extra data, column 10)"),
        (4, "is nested too deeply to be a row of training data"),
        (6, "is not valid JSON (Expecting value, column 1)"),
    ]
    for content, said in {
        '[{"a": 1},\n\n x]': ":3: is not valid JSON (Expecting value, column 2)",
        '[{"a": 1}\n': ":2: is not valid JSON (the list does not end, column 1)",
        '[{"a": 1},': ":1: is not valid JSON (the list does not end, column 11)",
        '[{"a": 1}\n {"a": 2}]': ":2: is not valid JSON (expecting ',' or ']', column 2)",
        '[{"a": 1}] x': ":1: is not valid JSON (expecting the end after ']', column 12)",
        '[{"a": 1},\n]': ":2: is not valid JSON (Expecting value, column 1)",
        '[{"a": "x\n"}]': ":1: is not valid JSON (Invalid control character at, column 10)",
        '[{"a": 1},\n{"a": "x': ":2: is not valid JSON (Unterminated string starting at, column 7)",
        "[\n" + "[" * 100_000: ":2: is nested too deeply to be a row of training data",
    }.items():
        assert refused(written(tmp_path, "a.json", content)).startswith(said)


def test_objects_over_several_lines_are_told_apart_from_broken_lines(tmp_path):
    one = '{\n "data": [{"a": 1}]\n}'
    assert "holds one object, not a list of rows. Its key 'data' holds a list" in refused(
        written(tmp_path, "a.json", one)
    )
    assert "It holds columns" in refused(written(tmp_path, "e.json", '{"q": ["x"],\n "a": ["y"]}'))
    assert "Put it into a list" in refused(written(tmp_path, "b.json", '{\n "a": 1}\n'))
    assert "stand over several lines" in refused(written(tmp_path, "c.json", f"\n{one}\n{one}"))
    assert bad(written(tmp_path, "d.jsonl", '{"a": \n{"a": 2}\n'))[0][0] == 1


def generated(random: random.Random, depth: int = 0) -> object:
    kind = random.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return random.choice([None, True, False])
    if kind == 1:
        return random.choice([0, -1, 12345678901234567890, -0.5, 1.25e-7, 3e300])
    if kind < 6:
        return "".join(random.choices('ab "\\\n\t/é\u2028你🙂\x00{}[],:', k=random.randrange(8)))
    if kind == 6:
        return [generated(random, depth + 1) for _ in range(random.randrange(4))]
    return {str(generated(random, 9)): generated(random, depth + 1) for _ in range(random.randrange(4))}


def test_a_list_read_through_a_tiny_window_is_what_json_reads(tmp_path):
    draw = random.Random(5)
    for _ in range(150):
        document = [generated(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(document, ensure_ascii=draw.random() < 0.5, indent=draw.choice([None, 1]))
        text = draw.choice(["", " ", "\n\r\n"]) + text + draw.choice(["", "\n", " \t"])
        path = written(tmp_path, "a.json", text)
        for size in (1, 2, 3, 7, 16, 61, 1 << 20):
            rows = list(read_json(File(str(path), "a", ".json", ""), 0, size))
            wanted = [element if isinstance(element, dict) else None for element in document]
            assert [row.value if isinstance(row, Row) else None for row in rows] == wanted, (size, text)
            assert [row.place.number for row in rows] == places_of_elements(text), (size, text)


def places_of_elements(text: str) -> list[int]:
    """The lines of a list's elements by another way: the parser, told where each stands."""
    found, at, decoder = [], text.index("[") + 1, json.JSONDecoder()
    space = re.compile(r"[\s,]*")
    while text[(at := space.match(text, at).end())] != "]":
        found.append(text.count("\n", 0, at) + 1)
        at = decoder.raw_decode(text, at)[1]
    return found


def test_a_list_that_json_refuses_is_refused_through_every_window(tmp_path):
    draw = random.Random(6)
    document = [{"a": "é\ud83d\ude00"[:1], "b": [1.5, -2e5, None, "\n"]}, {"c": True}]
    whole = json.dumps(document)
    checked = 0
    for _ in range(200):
        at = draw.randrange(1, len(whole))
        text = draw.choice(
            [whole[:at], whole[:at] + whole[at + 1 :], whole[:at] + draw.choice('",:]}[{x0') + whole[at:]]
        )
        try:
            wanted, fails = json.loads(text), False
        except json.JSONDecodeError as error:
            wanted, fails = (error.lineno, error.pos), True
        path = written(tmp_path, "a.json", text)
        said = set()
        for size in (1, 2, 5, 1 << 20):
            try:
                rows = list(read_json(File(str(path), "a", ".json", ""), 0, size))
                assert not fails, (size, text)
                assert [row.value for row in rows if isinstance(row, Row)] == [v for v in wanted if isinstance(v, dict)]
            except DataError as error:
                assert fails, (size, text)
                said.add(str(error))
        assert len(said) == fails
        checked += fails
    assert checked > 100


def test_lines_read_through_a_tiny_window_are_the_same(tmp_path):
    draw = random.Random(7)
    for _ in range(60):
        rows = [generated(draw) for _ in range(draw.randrange(1, 6))]
        text = (
            draw.choice(["", "\n", "\ufeff"])
            + '{"first": 1}\n'
            + "".join(
                json.dumps(row, ensure_ascii=draw.random() < 0.5) + draw.choice(["\n", "\r\n", "\n\n", "  \n"])
                for row in rows
            )
        )
        path = written(tmp_path, "a.jsonl", text)
        wanted = [
            (n, json.loads(line)) for n, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1) if line.strip()
        ]
        for size in (1, 2, 5, 17, 1 << 20):
            found = list(read_json(File(str(path), "a", ".jsonl", ""), 0, size))
            assert [row.place.number for row in found] == [n for n, _ in wanted]
            for row, (_, value) in zip(found, wanted, strict=True):
                assert row.value == value if isinstance(value, dict) else isinstance(row, BadRow)


def test_a_number_that_a_window_cuts_is_judged_whole(tmp_path):
    # Thousands of digits are refused as an integer, and are a number all the same where a point follows.
    path = written(tmp_path, "a.json", '[{"a": ' + "7" * 5000 + '.5e-4990}, {"a": ' + "7" * 6000 + "}]")
    for size in (100, 4500, 1 << 20):
        good, refused_one = read_json(File(str(path), "a", ".json", ""), 0, size)
        assert good.value == {"a": float("7" * 5000 + ".5e-4990")}
        assert refused_one.reason == "holds a number of 6000 digits"


def test_a_long_list_needs_little_memory(tmp_path):
    path = tmp_path / "a.json"
    row = json.dumps({"instruction": "Tell a story about the sea. " * 20, "output": "x\n" * 1000})
    count = 30_000_000 // len(row)
    with open(path, "w") as file:
        file.write("[" + row)
        for _ in range(count - 1):
            file.write("," + row)
        file.write("]")
    assert path.stat().st_size > 29_000_000
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(Source(path=str(path)))) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_a_broken_list_is_refused_without_reading_on(tmp_path, monkeypatch):
    path = written(tmp_path, "a.json", '[{"a": oops},' + " " * 50_000)
    read = []
    text = File.text

    def counted(self, size):
        for piece in text(self, size):
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(File, "text", counted)
    with pytest.raises(DataError, match="column 8"):
        list(read_json(File(str(path), "a", ".json", ""), 0, 64))
    assert sum(read) < 1000


def test_a_file_without_line_ends_is_refused_and_not_held(tmp_path, monkeypatch):
    for module in ("lines", "json_window"):
        monkeypatch.setattr(f"tune.data.sources.{module}.LONGEST", 10_000)
    for name, begin in (("a.jsonl", '{"a": "'), ("b.json", '[{"a": "'), ("c.csv", "a\n")):
        path = written(tmp_path, name, begin + "x" * 3_000_000)
        assert "is longer than 10000 characters" in refused(path)
    assert LONGEST == 1 << 26


# CSV


def test_csv_rows_say_the_line_on_which_they_start(tmp_path):
    path = written(tmp_path, "a.csv", 'a,b\r\n1,"x\r\ny"\r\n\r\n   \n2,\n"",z')
    assert rows_of(path) == [
        Row({"a": "1", "b": "x\r\ny".replace("\r\n", "\r\n")}, Place(0, 2)),
        Row({"a": "2", "b": ""}, Place(0, 6)),
        Row({"a": "", "b": "z"}, Place(0, 7)),
    ]


@pytest.mark.parametrize("size", [1, 3, 1 << 20])
def test_csv_of_spreadsheets_is_read(tmp_path, size):
    wanted = [{"a": "1", "b": "x,y"}, {"a": "2", "b": "z"}]
    for name, text in {
        "mark.csv": '\ufeffa,b\n1,"x,y"\n2,z\n',
        "semicolons.csv": "a;b\n1;x,y\n2;z\n",
        "tabs.csv": "a\tb\n1\tx,y\n2\tz\n",
        "mac.csv": 'a,b\r1,"x,y"\r2,z\r',
        "spaces.csv": ' a ,b\n1,"x,y"\n2,z\n',
        "blank.csv": '\n , \na,b\n1,"x,y"\n2,z',
        "index.csv": ',a,b\n0,1,"x,y"\n1,2,z\n',
        "tabs.tsv": "a\tb\n1\tx,y\n2\tz\n",
    }.items():
        path = written(tmp_path, name, text)
        file = File(str(path), "a", path.suffix, "")
        assert [row.value for row in read_csv(file, 0, size)] == wanted, name


def test_csv_rows_that_do_not_fit_are_set_aside(tmp_path):
    path = written(tmp_path, "a.csv", 'a,b\n1\n1,2\n1,2,3\n"x"y,2\n"1",3\n')
    rows = rows_of(path)
    assert [row.value["b"] for row in rows if isinstance(row, Row)] == ["2", "3"]
    assert bad(path) == [
        (2, "has 1 value, and the first line names 2 columns"),
        (4, "has 3 values, and the first line names 2 columns"),
        (5, "is not valid CSV (',' expected after '\"')"),
    ]


def test_csv_mistakes_of_the_whole_file_are_said(tmp_path):
    text = "Write a long poem about the sea and about the land behind it, please."
    row = ":1: the first line names the columns, and this one looks like a row ('Write a long"
    for content, said in {
        'a,b\n1,2\n3,"x\n4,5\n': ":3: a quote opens in this row and does not close",
        "a,b,a\n1,2,3\n": ":1: names the column 'a' twice",
        f'"{text}",The sea\nx,y\n': row,
        '"a"b,c\n1,2\n': ":1: the first line is not valid CSV",
        '"x\ny",b\n1,2\n': ":1: the first line names the columns, and this one looks like a row ('x",
        "What is 2 + 2?,4\nx,y\n": row.replace("Write a long", "What is 2 + 2?')"),
        "a,b\n": ": is empty: it holds no rows",
        "a\n\xff".encode("latin-1"): ":2: is not UTF-8 (byte 0xff)",
    }.items():
        assert refused(written(tmp_path, "a.csv", content)).startswith(said)
    for name in ("output", "query", "messages"):
        assert len(rows_of(written(tmp_path, "b.csv", f'"{text}",7,{name}\nx,y,z\n'))) == 1
    path = written(tmp_path, "survey.csv", f'"{text}",answer\nx,y\n')
    assert rows_of(path, columns={"instruction": text})[0].value == {"instruction": "x", "answer": "y"}


def test_a_csv_value_may_be_long(tmp_path):
    long = "word " * 100_000
    assert rows_of(written(tmp_path, "a.csv", f"a,b\n{long},x\n"))[0].value["a"] == long


# What is wrong with a file


def test_what_is_not_utf_8_is_said_after_the_rows_before_it(tmp_path):
    path = written(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": "caf\xe9"}\n')
    assert len(rows_of(path, limit=2)) == 2
    for size in (1, 2, 1 << 20):
        with pytest.raises(DataError, match=r"a:3: is not UTF-8 \(byte 0xe9\)"):
            list(read_json(File(str(path), "a", ".jsonl", ""), 0, size))
    assert refused(written(tmp_path, "b.json", b'[{"a": "\xc3')).startswith(":1: is not UTF-8 (byte 0xc3)")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), ": is packed with gzip. Let its name end in .gz"),
        ("a.jsonl", PACKERS[".zst"](b"{}"), ": is packed with Zstandard. Let its name end in .zst"),
        ("a.csv", as_parquet(ROWS), ": is a Parquet file. Let its name end in .parquet"),
        ("a.json", as_arrow(ROWS), ": is an Arrow file. Let its name end in .arrow"),
        ("a.csv", b"PK\x03\x04...", ": is a zip archive or a spreadsheet, not text"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), ": is UTF-16, not UTF-8. Save the file as UTF-8"),
        ("a.jsonl.gz", b'{"a": 1}\n', ": is no gzip archive. If it is not packed, take .gz from its name"),
        ("a.jsonl.zst", b'{"a": 1}\n', ": is no Zstandard archive. If it is not packed, take .zst"),
        ("a.jsonl.gz", gzip.compress(as_lines(ROWS), mtime=0)[:-9], ": ends in the middle of its gzip archive"),
        ("a.jsonl.zst", PACKERS[".zst"](as_lines(ROWS))[:-3], ": ends in the middle of its Zstandard archive"),
        ("a.parquet.gz", gzip.compress(as_parquet(ROWS), mtime=0)[:-9], ": ends in the middle of its gzip archive"),
        (
            "a.csv.gz",
            gzip.compress(as_csv(ROWS), mtime=0) + b"x" * 20,
            ": is a damaged gzip archive (Not a gzipped file",
        ),
        ("a.jsonl.zst", PACKERS[".zst"](as_lines(ROWS)) + b"x" * 20, ": is a damaged Zstandard archive (ZSTD"),
        ("a.parquet", b"a,b\n1,2\n", ": cannot be read as Parquet (Parquet magic bytes not found"),
        ("a.parquet", as_parquet(ROWS)[:-20], ": cannot be read as Parquet"),
        ("a.arrow", as_arrow(ROWS)[:-20], ": cannot be read as Arrow"),
        ("a.arrow", as_arrow_stream(ROWS)[:300], ": cannot be read as Arrow"),
        ("a.arrow", b'{"a": 1}\n', ": cannot be read as Arrow"),
        ("a.parquet", b"", ": cannot be read as Parquet"),
        ("a.jsonl", b"", ": is empty: it holds no rows"),
        ("a.jsonl", b" \n\n", ": is empty: it holds no rows"),
        ("a.json", b"[ ]", ": is empty: it holds no rows"),
        ("a.jsonl.gz", gzip.compress(b"\xef\xbb\xbf\n", mtime=0), ": is empty: it holds no rows"),
        ("a.parquet", as_parquet(ROWS[:0]), ": is empty: it holds no rows"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, name, content, said):
    assert refused(written(tmp_path, name, content)).startswith(said)


def test_a_table_with_a_column_twice_is_refused(tmp_path):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet").startswith(": names the column 'a' twice")


def test_a_value_that_cannot_be_made_costs_its_row_alone(tmp_path):
    content = as_parquet([{"a": "good"}, {"a": "bad!"}, {"a": "fine"}])
    for path in (written(tmp_path, "a.parquet", content.replace(b"bad!", b"b\xffd!")),):
        rows = rows_of(path)
        assert [row.value["a"] for row in rows if isinstance(row, Row)] == ["good", "fine"]
        assert [(row.place, row.reason[:35]) for row in rows if isinstance(row, BadRow)] == [
            (Place(0, 1), "holds a value that cannot be read (")
        ]


def test_no_room_to_unpack_is_said(tmp_path, monkeypatch):
    path = written(tmp_path, "a.parquet.gz", gzip.compress(as_parquet(ROWS), mtime=0))
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "w+b"))  # noqa: SIM115
    assert refused(path).startswith(": cannot be unpacked into a temporary file (No space left on device)")


def test_damaged_files_end_in_rows_or_in_one_message(tmp_path):
    draw = random.Random(11)
    whole = [
        (f"{number}{ending}{packing}", PACKERS[packing](write(ROWS)))
        for number, (ending, write) in enumerate((e, w) for e, writers in WRITERS.items() for w in writers)
        for packing in PACKERS
    ]
    ends = {"rows": 0, "bad": 0, "refused": 0}
    for _ in range(400):
        name, content = draw.choice(whole)
        damaged = bytearray(content)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(len(damaged))
            how = draw.randrange(4)
            if how == 0:
                damaged[at] = draw.randrange(256)
            elif how == 1:
                del damaged[at : at + draw.randrange(1, 40)]
            elif how == 2:
                damaged[at:at] = draw.choice([b'"', b"\n", b"\0", b"{", b"[", b",", b"\xff", b"\\ud8", damaged[:30]])
            else:
                damaged[at] ^= 1 << draw.randrange(8)
            if not damaged:
                break
        path = written(tmp_path, name, bytes(damaged))
        try:
            rows = rows_of(path)
        except DataError as error:
            said = str(error)
        else:
            assert all(type(row) in (Row, BadRow) for row in rows)
            ends["bad" if any(isinstance(row, BadRow) for row in rows) else "rows"] += 1
            continue
        assert said.startswith(str(path))
        assert said.isprintable()
        ends["refused"] += 1
    assert min(ends.values()) > 10
