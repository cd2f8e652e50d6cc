"""`tune check` and `tune preview`, off a terminal."""

from __future__ import annotations

import json

import pytest

from tests.data.conftest import fixture_path
from tune.cli.check import check
from tune.cli.preview import preview
from tune.errors import RecipeError


@pytest.fixture
def recipe(tmp_path):
    base = fixture_path("models/stories260K-mistral")
    rows = [{"instruction": f"Say {n}.", "output": f"It is  {n}."} for n in range(300)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {{base: {base}}}\ndata: {{train: {data}, eval: 0.1, template: alpaca}}\noutput: {tmp_path / 'run'}\n"
    )
    return path


def test_check_prints_the_numbers_and_the_warnings(recipe, capsys):
    check(str(recipe), [], quiet=False)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "format alpaca" in lines
    assert "rows 301" in lines
    assert "duplicates 1" in lines
    assert any(line.startswith("held out ") and "0 of them in train too" in line for line in lines)
    assert any(line.startswith("warning: 1 of ") or line == "recipe and data are usable" for line in lines)


def test_check_refuses_what_is_not_built(recipe):
    with pytest.raises(RecipeError, match="push"):
        check(str(recipe), ["push.repo=a/b"], quiet=True)


def test_preview_marks_what_is_trained(recipe, capsys):
    preview(str(recipe), [], 2, as_json=False, quiet=False)
    out = capsys.readouterr().out
    assert out.count("⟦") == out.count("⟧") == 2
    assert "### Response:⟦It is  0.</s>⟧" in out
    assert "rows.jsonl:1: " in out
    assert out.index("It is  0.") < out.index("It is  1.")


def test_preview_as_json_is_one_object_a_line_in_the_order_of_the_data(recipe, capsys):
    preview(str(recipe), ["data.train_on=responses"], 150, as_json=True, quiet=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 150
    for number, line in enumerate(lines):
        assert list(line) == ["ids", "tokens", "trained"]
        assert len(line["ids"]) == len(line["tokens"]) == len(line["trained"])
        said = "".join(t for t, trained in zip(line["tokens"], line["trained"], strict=True) if trained)
        assert said == f"It▁is▁▁{number}.</s>"
        assert line["trained"][0] is False


def test_preview_shows_what_there_is(recipe, capsys):
    preview(str(recipe), ["data.train_on=all"], 1000, as_json=True, quiet=True)
    assert len(capsys.readouterr().out.splitlines()) == 301
