"""Files and hub data sets: where each row stands, and one clear message for each thing that can be wrong."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import fixture_path
from tune.data.sources import read_rows
from tune.errors import DataError
from tune.recipe.schema import Source


def read(path, **options):
    return read_rows(Source(path=str(path), **options))


def refused(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert len(caught.value.problems) == 1
    return str(caught.value)


def test_json_lines_say_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"a": "x\xe2\x80\xa8y"}\n')
    rows = read(path)
    assert [(r.value["a"], r.where) for r in rows.good] == [(1, f"{path}:1"), ("x\u2028y", f"{path}:4")]


def test_array_elements_say_the_line_on_which_they_start(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1}, {"a": 2},\n\n {"a":\n 3}\n]\n')
    assert [(r.value["a"], r.where) for r in read(path).good] == [
        (1, f"{path}:2"),
        (2, f"{path}:2"),
        (3, f"{path}:4"),
    ]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_the_content_decides_and_not_the_ending(tmp_path, name):
    path = tmp_path / name
    for text in ('[{"a": 1}, {"a": 2}]', '{"a": 1}\n{"a": 2}\n'):
        path.write_text(text)
        assert [r.value["a"] for r in read(path).good] == [1, 2]


def test_lines_of_a_real_array_are_the_files_own():
    path = fixture_path("data/sharegpt-identity.json")
    lines = path.read_text().split("\n")
    rows = read(path).good
    assert len(rows) == 500
    for row in rows[::50]:
        number = int(row.where.rpartition(":")[2])
        assert lines[number - 1].strip() == "{"
        assert row.value["id"] in lines[number]


def test_rows_that_cannot_be_read_are_set_aside(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[1, 2]\n{"a": \n{"a": 2}\n"text"\n' + "[" * 100_000 + "\n")
    rows = read(path)
    assert [r.value["a"] for r in rows.good] == [1, 2]
    assert [(b.where, b.reason.split(" (")[0]) for b in rows.bad] == [
        (f"{path}:2", "is no object but [1, 2]"),
        (f"{path}:3", "is not valid JSON"),
        (f"{path}:5", 'is no object but "text"'),
        (f"{path}:6", "is nested too deeply to be a row of training data"),
    ]


def test_columns_are_renamed_and_limit_counts_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": i, "output": "old", "answer": str(i)}) + "\n" for i in range(9)))
    rows = read(path, columns={"instruction": "q", "output": "answer"}, limit=3).good
    assert [r.value for r in rows] == [{"instruction": i, "output": str(i)} for i in range(3)]
    path.write_text("[" + ", ".join('{"a": 1}' for _ in range(9)) + "]")
    assert len(read(path, limit=4)) == 4


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    good = tmp_path / "alpaca.jsonl"
    good.write_text('{"a": 1}')
    assert "there is no such file" in refused(tmp_path / "alpacca.jsonl")
    assert "Did you mean 'alpaca.jsonl'?" in refused(tmp_path / "alpacca.jsonl")
    assert f"There is no folder '{tmp_path}/no'" in refused(tmp_path / "no" / "x.jsonl")
    assert "is a folder; name one of its files, such as 'alpaca.jsonl'" in refused(tmp_path)
    assert "split: is for data sets on the hub" in refused(good, split="train")

    def written(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return refused(tmp_path / name)

    assert "is empty" in written("e.jsonl", b" \n\n")
    assert "holds no rows" in written("n.json", b"[]")
    assert "e.json:3: is not valid JSON (Expecting value, column 2)" in written("e.json", b'[{"a": 1},\n\n x]')
    assert "t.json:2: is not valid JSON" in written("t.json", b'[{"a": 1}\n')
    assert "r.json:1: is not valid JSON" in written("r.json", b"[{}] x")
    assert "l.jsonl:2: is not UTF-8 (byte 0xe9)" in written("l.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}')
    assert "Its key 'data' holds a list" in written("o.json", b'{\n "data": [{"a": 1}]\n}')
    for name in ("x.csv", "x.parquet", "x"):
        assert "reads .json and .jsonl files" in written(name, b"a,b")


def test_a_missing_file_is_never_looked_up_on_the_hub(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    assert "there is no such file" in refused("data/absent.jsonl")
    assert "there is no such file" in refused("data/absent.parquet")


@pytest.fixture
def hub_answers(monkeypatch):
    """The first question to the hub is answered, so that the libraries above go on to load."""
    monkeypatch.setattr("tune.data.sources.refused_at_once", lambda *args: None)


@pytest.mark.usefixtures("hub_answers")
def test_hub_rows_say_their_index_and_options_are_passed_on(monkeypatch):
    import datasets

    asked = {}

    def load_dataset(path, **options):
        asked.update(options, path=path)
        return datasets.Dataset.from_list([{"q": str(i)} for i in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read("owner/name", split="test", config="main", revision="v1", columns={"instruction": "q"}, limit=2).good
    assert asked == {"path": "owner/name", "name": "main", "split": "test", "revision": "v1"}
    assert [(r.value, r.where) for r in rows] == [
        ({"instruction": "0"}, "owner/name[test][0]"),
        ({"instruction": "1"}, "owner/name[test][1]"),
    ]
    read("owner/name")
    assert asked["split"] == "train"


def test_a_local_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert "is a folder" in refused("owner/name")


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
    assert said in refused("o/n", revision="v9")


@pytest.fixture
def hub_out_of_reach(tmp_path, monkeypatch):
    """No network: the one question fails, and nothing else may be asked but of the cache."""
    import datasets
    import huggingface_hub

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

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return loaded


def test_without_network_a_data_set_is_refused_at_once(hub_out_of_reach):
    assert refused("owner/name") == (
        "data: owner/name is neither here nor in the cache, and the Hub cannot be reached (no network, or "
        "HF_HUB_OFFLINE is set). Check the name, or go online once to fetch it."
    )
    assert hub_out_of_reach == []


@pytest.mark.parametrize("cached", ["hub/datasets--owner--MyName/snapshots", "datasets/owner___my_name"])
def test_without_network_the_cache_is_read(hub_out_of_reach, tmp_path, cached):
    (tmp_path / cached).mkdir(parents=True)
    assert len(read("owner/MyName")) == 1
    assert hub_out_of_reach == ["owner/MyName"]


def test_a_column_that_no_row_has_is_refused_by_its_key(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "x", "answer": "y"}\n{"question": "x", "hint": "h"}\n')
    assert refused(path, columns={"instruction": "question", "output": "answr"}) == (
        f"{path}: columns.output: there is no column 'answr'. It has: question, answer, hint. Did you mean 'answer'?"
    )
    assert len(read(path, columns={"output": "answer", "input": "hint"})) == 2
