"""Sources as a whole: what a path means, where a row stands, limits, renaming, digests, and the Hub."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import fixture_path
from tune.data.sources import EXTENSIONS, BadRow, Opened, Place, Row, is_hub_id, open_source
from tune.errors import DataError
from tune.recipe.schema import Source


def opened(path, **options) -> Opened:
    return open_source(Source(path=str(path), **options))


def read(path, **options) -> list[Row | BadRow]:
    return list(opened(path, **options))


def values(path, **options) -> list[dict]:
    return [row.value for row in read(path, **options) if isinstance(row, Row)]


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def not_opened(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        opened(path, **options)
    return str(caught.value)


def lines(path: Path, *numbers: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"a": number}) + "\n" for number in numbers))
    return path


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Files, folders and patterns


def test_lines_of_a_real_list_are_the_files_own():
    path = fixture_path("data/sharegpt-identity.json")
    text = path.read_text().split("\n")
    rows = read(path)
    assert len(rows) == 500
    for row in rows[::50]:
        assert text[row.place.number - 1].strip() == "{"
        assert row.value["id"] in text[row.place.number]


def test_a_folder_is_its_files_by_name(here):
    lines(here / "data" / "b.jsonl", 3, 4)
    (here / "data" / "a.csv").write_text("a\n1\n2\n")
    lines(here / "data" / ".hidden.jsonl", 9)
    lines(here / "data" / "inner" / "c.jsonl", 9)
    (here / "data" / "README.md").write_text("about")
    (here / "data" / "empty.jsonl").write_text("")
    source = opened("data/")
    assert source.files == ("data/a.csv", "data/b.jsonl", "data/empty.jsonl")
    rows = list(source)
    assert [row.value["a"] for row in rows] == ["1", "2", 3, 4]
    assert [source.where(row.place) for row in rows] == [
        "data/a.csv:2",
        "data/a.csv:3",
        "data/b.jsonl:1",
        "data/b.jsonl:2",
    ]
    assert [row.value["a"] for row in opened("data", limit=3)] == ["1", "2", 3]


def test_a_pattern_is_the_files_that_it_matches(here):
    for name in ("x/b.jsonl", "x/a.jsonl", "x/y/c.jsonl", "x/.d.jsonl", "x/e.txt"):
        lines(here / name, ord(name[-7]))
    assert opened("x/*.jsonl").files == ("x/a.jsonl", "x/b.jsonl")
    assert opened("x/**/*.jsonl").files == ("x/a.jsonl", "x/b.jsonl", "x/y/c.jsonl")
    assert opened("x/[b-z].*").files == ("x/b.jsonl",)
    assert opened(f"{here}/x/*").files == (f"{here}/x/a.jsonl", f"{here}/x/b.jsonl")
    assert [row.value["a"] for row in opened("x/**", limit=2)] == [ord("a"), ord("b")]
    # What is there by that very name wins.
    assert opened(lines(here / "x[1].jsonl", 1)).files == (f"{here}/x[1].jsonl",)


def test_folders_that_datasets_saved_are_read(here):
    import datasets

    table = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    table.save_to_disk(here / "one")
    assert values("one") == [{"a": 1}, {"a": 2}]
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(here / "several")
    assert "Name one of them, such as several/test." in refused("several")
    assert values("several/train") == [{"a": 1}, {"a": 2}]


def test_a_missing_path_is_said_with_the_nearest_name(here):
    lines(here / "alpaca.jsonl", 1)
    lines(here / "data" / "chats.jsonl", 1)
    assert not_opened("alpacca.jsonl") == (
        "alpacca.jsonl: there is no such file. Paths start at the working directory. Did you mean 'alpaca.jsonl'?"
    )
    assert "There is no folder 'no' either." in not_opened("no/x.jsonl")
    assert "there is no such file or folder" in not_opened("./dat")
    assert "Did you mean 'data'?" in not_opened("./dat")
    assert "A data set on the Hub is written OWNER/NAME." in not_opened("squad")
    assert "dta/*.jsonl: matches no file: dta: there is no such" in not_opened("dta/*.jsonl")
    assert "Did you mean 'data'?" in not_opened("dta/*.jsonl")
    assert "data/*.csv: matches no file." in not_opened("data/*.csv")
    assert "data holds chats.jsonl." in not_opened("data/*.csv")
    assert "Did you mean 'chats.jsonl'?" in not_opened("data/char?.jsonl")
    (here / "link.jsonl").symlink_to("gone.jsonl")
    assert not_opened("link.jsonl") == "link.jsonl: is a link to 'gone.jsonl', which is not there. Mend the link."


def test_a_folder_that_gives_nothing_says_why(here):
    (here / "empty").mkdir()
    assert not_opened("empty") == "empty: is a folder, and it is empty. Name another."
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("x")
    assert "texts: is a folder, and none of its files (a.txt) is read: a .txt file is not read." in not_opened("texts")
    lines(here / "deep" / "train" / "a.jsonl.gz", 1)
    assert not_opened("deep") == (
        "deep: is a folder, and its rows are further down. Name deep/train, or write deep/**/*.jsonl.gz for all below."
    )
    (here / "model").mkdir()
    (here / "model" / "config.json").write_text("{}")
    assert "model: is a folder that holds a model (config.json), not rows." in not_opened("model")
    lines(here / "blank" / "a.jsonl")
    assert refused("blank") == "blank: is empty: it holds no rows. Give data with at least one."


def test_the_same_rows_packed_and_unpacked_are_not_read_twice(here):
    lines(here / "data" / "a.jsonl", 1)
    (here / "data" / "a.jsonl.gz").write_bytes(b"")
    for path in ("data", "data/a.*"):
        assert "holds data/a.jsonl and data/a.jsonl.gz: most likely the same rows twice" in not_opened(path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.xlsx", "a .xlsx file is not read. Save the sheet as .csv, in UTF-8."),
        ("a.zip", "a .zip file is not read. Unpack it, or pack with .gz or .zst."),
        ("a.tar.gz", "a .tar file is not read. Unpack it"),
        ("a.pkl", "a .pkl file is not read. Such a file can run code when it is opened, so it never is."),
        ("a.txt", 'Rows have columns: save each text as a line {"text": "..."} of a .jsonl file.'),
        ("a.feather", "let its name end in .arrow"),
        ("a.jsnl", "Data files are .jsonl, .json, .ndjson, .csv, .tsv, .parquet, .arrow, each also .gz or .zst."),
        ("a.jsnl", "Did you mean '.jsonl'?"),
        ("a", "a: a file without an ending is not read."),
        ("a.gz", "its name does not say what is packed. Let it end in one such as .jsonl.gz."),
    ],
)
def test_a_kind_that_is_not_read_is_said(here, name, said):
    (here / name).write_bytes(b"x")
    assert said in not_opened(name)
    if Path(name).suffix:
        assert said in not_opened(f"*{Path(name).suffix}")


def test_addresses_and_what_is_no_path_are_refused():
    assert not_opened("https://huggingface.co/datasets/o/n/tree/main") == (
        "https://huggingface.co/datasets/o/n/tree/main: is an address. Write the data set's id: o/n."
    )
    assert "is an address (s3), and rows are read from files" in not_opened("s3://bucket/a.jsonl")
    assert "is no path (embedded null byte)" in not_opened("a\0.jsonl")
    assert "cannot be looked at (File name too long)" in not_opened("x" * 5000 + ".jsonl")
    assert "is a local path, and split: is for data sets on the Hub" in not_opened("data/a.jsonl", split="train")


def test_only_regular_files_are_opened(here):
    os.mkfifo("pipe.jsonl")  # to open one for reading waits for a writer
    assert "is no regular file but a pipe" in not_opened("pipe.jsonl")
    assert "is no regular file but a device" in not_opened("/dev/null")
    with socket.socket(socket.AF_UNIX) as held:
        held.bind("socket.jsonl")
        assert "socket.jsonl: " in not_opened("socket.jsonl")
    with pytest.raises(DataError, match="a pipe"):
        opened(".")


def deny(monkeypatch, name: str, call: str) -> None:
    """As for a person who is not root."""
    real = getattr(os, call)

    def denied(path, *args, **options):
        if os.fspath(path).endswith(name):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, denied)


def test_what_is_not_permitted_is_said(here, monkeypatch):
    lines(here / "data" / "a.jsonl", 1)
    with monkeypatch.context() as patch:
        deny(patch, "a.jsonl", "open")
        assert not_opened("data/a.jsonl") == (
            "data/a.jsonl: cannot be read (Permission denied). Check the file's permissions."
        )
        assert "data/a.jsonl: cannot be read (Permission denied)" in not_opened("data")
    with monkeypatch.context() as patch:
        deny(patch, "data", "scandir")
        assert not_opened("data") == "data: cannot be listed (Permission denied). Check the folder's permissions."
    with monkeypatch.context() as patch:
        deny(patch, "a.jsonl", "stat")
        assert "data/a.jsonl: cannot be looked at (Permission denied)" in not_opened("data/a.jsonl")


def test_a_file_that_changes_is_refused(here):
    path = lines(here / "a.jsonl", *range(100_000))
    source = opened("a.jsonl")
    rows = iter(source)
    next(rows)
    with open(path, "a") as file:
        file.write('{"a": 1}\n')
    with pytest.raises(DataError, match="changed while it was being read"):
        list(rows)
    with pytest.raises(DataError, match="changed while it was being read"):
        source.digest()
    assert len(read("a.jsonl")) == 100_001
    source = opened("a.jsonl")
    path.unlink()
    with pytest.raises(DataError, match="was there, and is gone"):
        list(source)


def test_a_disk_that_fails_is_said(here, monkeypatch):
    lines(here / "a.jsonl", 1)
    source = opened("a.jsonl")
    real = open

    class Failing:
        def __init__(self, raw):
            self.raw, self.fileno = raw, raw.fileno

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.raw.close()

        def read(self, size):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *args, **options: Failing(real(*args, **options)))
    with pytest.raises(DataError, match=r"a.jsonl: cannot be read \(Input/output error\). Check the file and its disk"):
        list(source)


# Limit, columns, digest


def test_limit_counts_every_row_over_all_files_and_reads_no_further(here):
    (here / "data").mkdir()
    (here / "data" / "a.jsonl").write_text('{"a": 1}\n[]\n{"a": 2}\n')
    (here / "data" / "b.jsonl").write_text('{"a": 3}\n{"a": 4}\n')
    (here / "data" / "c.jsonl").write_bytes(b"\xff\xff")
    assert [type(row) for row in read("data", limit=2)] == [Row, BadRow]
    assert read("data", limit=5)[3:] == [Row({"a": 3}, Place(1, 1)), Row({"a": 4}, Place(1, 2))]
    assert "data/c.jsonl:1: is not UTF-8" in refused("data", limit=6)


def test_columns_are_renamed(here):
    (here / "a.jsonl").write_text('{"q": 1, "output": "old", "answer": "x", "input": "i"}\n[]\n{"output": "old"}\n')
    rows = read("a.jsonl", columns={"instruction": "q", "output": "answer"})
    assert [getattr(row, "value", None) for row in rows] == [
        {"instruction": 1, "output": "x", "input": "i"},
        None,
        {},
    ]
    swapped = values("a.jsonl", columns={"input": "q", "q": "input"}, limit=1)
    assert swapped == [{"input": 1, "q": "i", "output": "old", "answer": "x"}]


def test_a_column_that_no_row_has_is_refused_before_any_row(here):
    (here / "a.jsonl").write_text('{"question": "x", "answer": "y"}\n' * 100 + '{"question": "x", "hint": "h"}\n')
    source = opened("a.jsonl", columns={"instruction": "question", "output": "answr"})
    with pytest.raises(DataError) as caught:
        iter(source)
    assert str(caught.value) == (
        "a.jsonl: columns.output: there is no column 'answr'. It has: question, answer. Did you mean 'answer'?"
    )
    # One that only the last row has is a column.
    source = opened("a.jsonl", columns={"input": "hint"})
    assert [[*source][-1].value for _ in range(2)] == [{"question": "x", "input": "h"}] * 2
    assert "no column 'hint'" in refused("a.jsonl", columns={"input": "hint"}, limit=100)


def test_a_digest_is_of_the_contents_alone(here):
    one = lines(here / "a" / "x.jsonl", 1, 2)
    digest = opened(one).digest()
    shutil.copy(one, here / "copy.jsonl")
    assert opened("copy.jsonl").digest() == opened("a").digest() == opened("a/*").digest() == digest
    assert len(digest) == 64
    os.utime(one, (1, 1))
    assert opened(one).digest() == digest
    # The same bytes in two files are other rows' places; and read as another kind, other rows.
    different = {digest, opened(lines(here / "y.jsonl", 1, 3)).digest()}
    # Packed or not, these bytes are refused under one of the two names.
    for name in ("packed.jsonl", "packed.jsonl.gz"):
        (here / name).write_bytes(gzip.compress(one.read_bytes(), mtime=0))
        different.add(opened(name).digest())
    lines(here / "b" / "1.jsonl", 1), lines(here / "b" / "2.jsonl", 2)
    different.add(opened("b").digest())
    for name in ("t.csv", "t.tsv"):
        (here / name).write_text("a,b\tc\n1,2\t3\n")
        different.add(opened(name).digest())
    # Where one file ends and the next begins is part of it, whatever they hold.
    (here / "c").mkdir()
    (here / "c" / "1.jsonl").write_bytes(
        (here / "b" / "1.jsonl").read_bytes() + b".jsonl" + (here / "b" / "2.jsonl").read_bytes()
    )
    different.add(opened("c").digest())
    assert len(different) == 8


def test_opening_reads_no_rows_and_imports_nothing_heavy(here):
    lines(here / "a.jsonl", 1)
    code = (
        "import sys; from tune.data.sources import open_source; from tune.recipe.schema import Source\n"
        "print(*map(repr, open_source(Source(path='a.jsonl'))))\n"
        "print([m for m in ('pyarrow', 'datasets', 'torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    root = str(Path(__file__).resolve().parents[2])
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True
    )
    assert run.stdout == "Row(value={'a': 1}, place=Place(file=0, number=1))\n[]\n", run.stderr


# The Hub


def test_what_ends_as_a_file_is_never_looked_up_on_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    for name in ("data/absent.jsonl", "data/absent.parquet", "data/absent.csv.gz", "data/absent.xlsx"):
        assert not is_hub_id(name)
        assert "there is no such file" in not_opened(name)
    assert is_hub_id("owner/name")
    assert is_hub_id("owner/name-v1.5")
    assert {".jsonl", ".gz", ".xlsx"} <= EXTENSIONS


def test_a_local_path_wins_over_a_hub_id(here):
    lines(here / "owner" / "name" / "a.jsonl", 7)
    assert values("owner/name") == [{"a": 7}]


@pytest.fixture
def hub_answers(monkeypatch):
    """The first questions to the hub are answered, so that the libraries above go on to load."""
    import datasets
    from datasets.packaged_modules.json.json import Json

    monkeypatch.setattr("tune.data.sources.hub_rows.refused_at_once", lambda *args: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: Json.__new__(Json))


@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize("kind", ["webdataset", "pandas"])
def test_kinds_of_data_that_may_hold_pickles_are_refused_before_they_are_read(monkeypatch, kind):
    import datasets
    from datasets.packaged_modules.pandas.pandas import Pandas
    from datasets.packaged_modules.webdataset.webdataset import WebDataset

    made = {"webdataset": WebDataset, "pandas": Pandas}[kind]
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: made.__new__(made))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("read it"))
    assert f"o/n holds data of a kind that is not read here ({kind})" in not_opened("o/n")


@pytest.mark.usefixtures("hub_answers")
def test_hub_rows_say_their_index_and_options_are_passed_on(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_list([{"q": str(i)} for i in range(1500)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"split": "test", "config": "main", "revision": "v1", "columns": {"instruction": "q"}}
    source = opened("owner/name", **options, limit=1200)
    assert asked == {"path": "owner/name", "name": "main", "split": "test", "revision": "v1"}
    rows = list(source)
    assert [row.value for row in rows] == [{"instruction": str(i)} for i in range(1200)]
    assert source.files == ("owner/name[test]",)
    assert [source.where(row.place) for row in rows[1100:1102]] == ["owner/name[test][1100]", "owner/name[test][1101]"]
    opened("owner/name")
    assert asked["split"] == "train"
    assert "owner/name: columns.input: there is no column 'p'" in refused("owner/name", columns={"input": "p"})


@pytest.fixture
def local_hub(here, hub_answers, monkeypatch):
    """`datasets` itself, with a file in the place of what it would fetch."""
    import datasets

    real = datasets.load_dataset

    def load_dataset(path, *, name, split, revision):
        return real("json", name, data_files={"train": "rows.jsonl"}, split=split, cache_dir=str(here / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return lines(here / "rows.jsonl", *range(20))


def test_a_part_of_a_split_is_read_as_datasets_does(local_hub):
    source = opened("o/n", split="train[:10%]")
    assert [row.value["a"] for row in source] == [0, 1]
    assert source.where(Place(0, 1)) == "o/n[train[:10%]][1]"
    assert [row["a"] for row in values("o/n", split="train[18:]", limit=1)] == [18]


def test_a_hub_digest_follows_the_data_and_the_split(local_hub):
    digests = [opened("o/n", split=split).digest() for split in (None, "train", "train[:10]", "train[10:]")]
    assert digests[0] == digests[1]
    assert len({*digests}) == 3
    lines(local_hub, *range(1, 21))
    os.utime(local_hub, (1, 1))
    assert opened("o/n").digest() not in digests


def test_features_of_datasets_become_plain_values(here, hub_answers, monkeypatch):
    import datasets

    features = datasets.Features(
        {
            "tools": datasets.Json(),
            "turns": datasets.List({"role": datasets.Value("string")}),
            "picture": datasets.Image(),
        }
    )
    row = {"tools": {"a": [1, "x"]}, "turns": [{"role": "user"}], "picture": {"path": None, "bytes": b"no picture"}}
    table = datasets.Dataset.from_list([row], features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    assert values("o/n") == [row]


def test_a_damaged_cache_is_said(hub_answers, monkeypatch):
    import datasets

    table = datasets.Dataset.from_list([{"a": 1}])

    def fails(*args, **options):
        raise OSError("Corrupt buffer")
        yield

    monkeypatch.setattr(datasets.Dataset, "iter", fails)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: table)
    assert "o/n[train]: cannot be read from the cache (Corrupt buffer). Remove its folder" in refused("o/n")


@pytest.mark.usefixtures("hub_answers")
@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (
            "DatasetNotFoundError",
            "Dataset 'o/n' is a gated dataset on the Hub.",
            "Accept its terms at https://huggingface",
        ),
        (
            "DatasetNotFoundError",
            "Dataset 'o/n' doesn't exist on the Hub",
            "neither here nor a data set on the Hub",
        ),
        ("DatasetNotFoundError", "Revision 'v9' doesn't exist for dataset", "has no revision 'v9'"),
        ("ConnectionError", "Couldn't reach the Hugging Face Hub: offline mode", "HF_HUB_OFFLINE"),
        ("ValueError", "Unknown split \"x\". Should be one of ['train'].", "split 'train' of o/n does not fit"),
        ("ValueError", "Config name is missing. Please pick one", "config None of o/n does not fit"),
        ("RuntimeError", "Dataset scripts are no longer supported", "made by a script"),
        ("OSError", "disk is full", "cannot be loaded from the Hub (disk is full)"),
    ],
)
def test_what_is_wrong_on_the_hub_is_said(monkeypatch, kind, text, said):
    import datasets

    error = getattr(datasets.exceptions, kind, None) or getattr(__import__("builtins"), kind)

    def load_dataset(*args, **options):
        raise error(text)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert said in not_opened("o/n", revision="v9")


@pytest.fixture
def hub_out_of_reach(tmp_path, monkeypatch):
    """No network: the one question fails, and nothing else may be asked but of the cache."""
    import datasets
    import huggingface_hub
    from datasets.packaged_modules.cache.cache import Cache

    class ConnectError(Exception):
        pass

    def ask(self, *args, **options):
        assert options["timeout"] == 10
        raise ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    loaded = []

    def load_dataset(path, **options):
        loaded.append(path)
        return datasets.Dataset.from_list([{"q": "1"}])

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **options: Cache.__new__(Cache))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return loaded


def test_without_network_a_data_set_is_refused_at_once(hub_out_of_reach):
    assert not_opened("owner/name") == (
        "data: owner/name is neither here nor in the cache, and the Hub cannot be reached (no network, or "
        "HF_HUB_OFFLINE is set). Check the name, or go online once to fetch it."
    )
    assert hub_out_of_reach == []


@pytest.mark.parametrize("cached", ["hub/datasets--owner--MyName/snapshots", "datasets/owner___my_name"])
def test_without_network_the_cache_is_read(hub_out_of_reach, tmp_path, cached):
    (tmp_path / cached).mkdir(parents=True)
    assert len(read("owner/MyName")) == 1
    assert hub_out_of_reach == ["owner/MyName"]
