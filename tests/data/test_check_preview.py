"""`tune check` and `tune preview`, off a terminal."""

from __future__ import annotations

import io
import json
import shutil
import sys

import pytest

from tests.data.conftest import fixture_path
from tune.cli.check import check
from tune.cli.preview import preview
from tune.errors import ModelError, RecipeError


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


@pytest.mark.parametrize("verb", ["check", "preview"])
def test_what_is_not_built_is_refused_before_anything_is_read(recipe, verb, monkeypatch):
    monkeypatch.setattr(f"tune.cli.{verb}.refusals", lambda recipe: ["data.eval: is not in this version."])
    arguments = {"check": (), "preview": (2, False)}[verb]
    with pytest.raises(RecipeError, match=r"data\.eval: is not in this version"):
        {"check": check, "preview": preview}[verb](str(recipe), ["data.train=missing.jsonl"], *arguments, quiet=True)


def test_check_says_that_the_hub_is_asked_later(recipe, capsys):
    check(str(recipe), ["push.repo=a/b"], quiet=False)
    out = capsys.readouterr().out
    assert "push         a/b: not asked here" in out
    check(str(recipe), [], quiet=False)
    assert "push " not in capsys.readouterr().out


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


def test_check_counts_steps_and_weights(recipe, tmp_path, capsys):
    (tmp_path / "more.jsonl").write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n")
    sources = f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, weight: 2}}, {tmp_path / 'more.jsonl'}]"
    check(str(recipe), [sources, "data.eval=0", "train.epochs=1.5", "train.batch_size=100"], quiet=True)
    lines = capsys.readouterr().out.splitlines()
    assert "epoch        603 examples, weights counted, in 7 steps" in lines
    assert "steps        11 of 100 examples" in lines


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.optimizer=paged_adamw_8bit"], "train.optimizer: paged_adamw_8bit needs a CUDA device"),
        (["tracking.to=trackio"], "tracking.to: trackio is not installed"),
        (["adapter.start_from=./absent"], "adapter.start_from: ./absent does not exist"),
        (["adapter.targets=q_prj"], "adapter.targets: 'q_prj' names no linear layer of"),
        (["adapter.exclude=q_prj"], "adapter.exclude: 'q_prj' names no linear layer of"),
    ],
)
def test_check_refuses_what_training_refuses(recipe, monkeypatch, overrides, words):
    import accelerate.tracking
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises((RecipeError, ModelError)) as caught:
        check(str(recipe), overrides, quiet=True)
    assert words in str(caught.value)


def test_check_refuses_a_tokenizer_that_is_not_the_models(recipe, tmp_path):
    copied = tmp_path / "base"
    shutil.copytree(fixture_path("models/stories260K-mistral"), copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ModelError, match=r"gives token \d+, and the model has 300 embeddings"):
        check(str(recipe), [f"model.base={copied}"], quiet=True)


def test_check_refuses_a_config_that_no_model_can_be_built_from(recipe, tmp_path):
    copied = tmp_path / "base"
    shutil.copytree(fixture_path("models/stories260K-mistral"), copied)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "hidden_act": "slu"}))
    with pytest.raises(ModelError, match=r"^model\.base: the model that the config.json of .* cannot be built"):
        check(str(recipe), [f"model.base={copied}"], quiet=True)


def test_preview_marks_examples_that_are_cut(recipe, tmp_path, capsys):
    rows = [{"instruction": "x", "output": "a"}, {"instruction": "x", "output": "a " * 200}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preview(str(recipe), ["data.max_length=200"], 2, as_json=False, quiet=False)
    short, long = (line for line in capsys.readouterr().out.splitlines() if line.startswith("---"))
    assert short.endswith(" trained on")
    assert "rows.jsonl:2: 200 tokens, " in long
    assert long.endswith(" trained on, cut at data.max_length (200)")


def test_preview_takes_no_notice_of_weights(recipe, tmp_path, capsys):
    preview(str(recipe), [f"data.train=[{{path: {tmp_path / 'rows.jsonl'}, weight: 0.004}}]"], 1, True, True)
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize(("n", "told"), [(1, "only the first source, "), (302, "")])
def test_preview_tells_a_terminal_of_sources_that_are_not_shown(recipe, tmp_path, capsys, monkeypatch, n, told):
    (tmp_path / "more.jsonl").write_text(json.dumps({"instruction": "x", "output": "y"}) + "\n")
    sources = f"data.train=[{tmp_path / 'rows.jsonl'}, {tmp_path / 'more.jsonl'}]"
    preview(str(recipe), [sources], n, as_json=True, quiet=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    preview(str(recipe), [sources], n, as_json=True, quiet=False)
    out, err = capsys.readouterr()
    assert err.startswith(told)
    assert ("data.train.0.limit=1" in err) == bool(told)
    assert len(out.splitlines()) == n
    preview(str(recipe), [sources, "data.train.0.limit=1"], 2, as_json=False, quiet=False)
    shown, told = capsys.readouterr()
    assert "more.jsonl:1: " in shown
    assert told == ""


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_an_output_that_is_not_utf8_gets_plain_marks(recipe, monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
    preview(str(recipe), [], 1, as_json=False, quiet=False)
    check(str(recipe), [], quiet=False)
    sys.stdout.flush()
    said = raw.getvalue().decode(encoding)
    assert "### Response:[[It is  0.</s>]]" in said
    assert "recipe and data are usable" in said
