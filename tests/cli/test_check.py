"""What `tune check` says of data that can be used: copies, near copies and rows that were dropped."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import write_recipe
from tests.training.jobs import WORDS
from tune.cli.main import _run


def long_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def text(words: int) -> str:
        return " ".join(f"{draw.choice(WORDS)}{draw.randrange(1000)}" for _ in range(words))

    return [{"instruction": text(12), "output": text(20)} for _ in range(count)]


def nearly(row: dict[str, str]) -> dict[str, str]:
    """A row with one word changed."""
    first, _, rest = row["output"].partition(" ")
    return {**row, "output": f"quite {rest}" if first != "quite" else rest}


def write_data(path: str, rows: list[object]) -> None:
    Path(path).write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def checked(capfd: pytest.CaptureFixture[str], *overrides: str) -> tuple[dict[str, list[str]], str]:
    """The sources' numbers by name, and all that was printed."""
    capfd.readouterr()
    assert _run(["check", "recipe.yaml", *overrides]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    numbers: dict[str, list[str]] = {}
    for line in out.splitlines():
        if found := re.fullmatch(r"  (\S+(?: \S+)*) +(\S+(?: \S+)*)", line):
            numbers.setdefault(found[1].strip(), []).append(found[2])
    return numbers, out


def test_near_copies_are_counted_for_each_source_and_shown(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = long_rows(30)
    write_data("train.jsonl", [*rows, rows[0], *(nearly(row) for row in rows[5:10])])
    write_data("more.jsonl", [nearly(nearly(rows[20])), *long_rows(5, seed=1)])
    write_data("eval.jsonl", [nearly(rows[3]), rows[4], *long_rows(5, seed=2)])
    write_recipe(work, data__train=["train.jsonl", "more.jsonl"], data__eval=["eval.jsonl"], data__max_length=1000)
    numbers, out = checked(capfd)
    assert numbers["duplicates"] == ["1", "0", "0"]
    assert numbers["near duplicates"] == ["5", "1", "0"]
    assert "7 examples, " in out
    assert "1 of them in train too, 1 nearly\n" in out
    assert (
        "warning: 6 of 42 training examples nearly repeat an earlier one (train.jsonl:6 ~ train.jsonl:32, "
        "train.jsonl:7 ~ train.jsonl:33, train.jsonl:8 ~ train.jsonl:34, ...). Keep one of them" in out
    )
    assert "warning: 1 of 7 held-out examples nearly repeat a training example (train.jsonl:4 ~ eval.jsonl:1):" in out
    assert out.endswith("recipe and data are usable, with 4 warnings\n")


def test_near_copies_over_a_fraction_are_told(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = long_rows(100)
    write_data("train.jsonl", [*rows, *(nearly(row) for row in rows)])
    numbers, out = checked(capfd, "data.eval=0.3", "data.max_length=1000")
    inside, across = int(numbers["near duplicates"][0]), re.search(r"0 of them in train too, (\d+) nearly", out)
    assert across is not None
    assert inside > 20
    assert int(across[1]) > 20
    among = re.search(r"warning: (\d+) of \d+ held-out examples nearly repeat an earlier one \(train", out)
    # Of 100 pairs, each has both halves here, both halves there, or one on either side.
    assert inside + int(across[1]) + int(among[1] if among else 0) == 100


def test_rows_in_one_template_are_no_copies(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_data(
        "train.jsonl", [{"instruction": f"Is {n} odd?", "output": "No." if n % 2 else "Yes."} for n in range(40)]
    )
    numbers, out = checked(capfd, "data.system=Answer with one of two words and in no case with another.")
    assert numbers["near duplicates"] == ["0"]
    assert out.endswith("recipe and data are usable\n")


def test_dropped_rows_are_counted_and_the_first_are_shown(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad = [{"instruction": f"{n}"} for n in range(5)]
    long_prompt, long_answer = {"instruction": "a " * 900, "output": "b"}, {"instruction": "a", "output": "b " * 900}
    write_data("train.jsonl", [*long_rows(3), *bad, "{oops", long_prompt, long_answer])
    numbers, out = checked(capfd, "data.on_bad=drop", "data.max_length=320")
    assert numbers["rows"] == ["11"]
    assert numbers["bad"] == ["6"]
    assert numbers["zero-target"] == ["1"]
    dropped = [line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("dropped ")]
    assert dropped == [
        *(f"train.jsonl:{n}: has no 'output' (it has: instruction)" for n in (4, 5, 6)),
        "train.jsonl:10: nothing of it is trained on",
    ]
    assert "warning: train.jsonl (train): 7 of 11 rows are dropped." in out
    again, _ = checked(capfd, "data.on_bad=drop", "data.max_length=320", "data.on_long=drop")
    assert again["too long"] == ["2"]
    assert again["zero-target"] == ["0"]


def test_a_search_that_was_ended_says_at_least(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import tune.data.near_duplicates as module

    monkeypatch.setattr(module, "_MOST_COMPARED", 2)
    rows = long_rows(30)
    write_data("train.jsonl", [*rows, *(nearly(row) for row in rows)])
    numbers, _ = checked(capfd, "data.max_length=1000")
    assert re.fullmatch(r"at least \d+", numbers["near duplicates"][0])


def test_a_terminal_gets_a_table(
    work: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _run(["check", "recipe.yaml", "data.eval=eval.jsonl", "--quiet"]) == 0
    out = capfd.readouterr().out
    assert re.search(r"^near duplicates +\d+ +\d+$", out, re.MULTILINE)
    assert re.search(r"^rows +40 +6$", out, re.MULTILINE)


def test_training_does_not_look_for_near_copies(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune.data.near_duplicates as module

    monkeypatch.setattr(module, "find_near_copies", lambda *given: pytest.fail("training looks for near copies"))
    assert _run(["train", "recipe.yaml", "--quiet"]) == 0
