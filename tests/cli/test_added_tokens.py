"""`data.add_tokens` as every verb that reads a recipe or a run sees it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.tiny import write_model
from tests.training.jobs import tiny_recipe
from tune.cli.main import _run


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = write_model(tmp_path / "base", "mistral", vocab_size=326)
    tiny_recipe(tmp_path, base=base, data__template="chatml", data__add_tokens=True, train__max_steps=1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    capfd.readouterr()
    assert _run(list(arguments)) == 0, capfd.readouterr().err
    return capfd.readouterr().out.splitlines()


def test_all_verbs_mean_the_same_tokens(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = "added tokens <|im_start|> 326, <|im_end|> 327"
    assert line in said(capfd, "check", "recipe.yaml")
    example = json.loads(said(capfd, "preview", "recipe.yaml", "-n", "1", "--json")[0])
    shown = dict(zip(example["ids"], zip(example["tokens"], example["trained"], strict=True), strict=True))
    assert shown[326] == ("<|im_start|>", False)
    assert shown[327] == ("<|im_end|>", True), "the last one ends the answer"
    out = said(capfd, "train", "recipe.yaml")
    assert line in out
    assert "trained rows 2 of embed_tokens and lm_head" in out
    assert any(re.fullmatch(r"embeddings, norms, head +\S+ [kM]B +256", text) for text in out), "2 x 2 rows of 64"
    for flags in ([], ["--without-adapter"]):
        said(capfd, "generate", "run", "Say.", "--max-new-tokens", "2", *flags)
    assert any("vocabulary 328 tokens, was 326" in text for text in said(capfd, "merge", "run"))
    said(capfd, "generate", "run/merged", "Say.", "--max-new-tokens", "2")
    said(capfd, "merge", "run", "--prove")


def test_without_the_key_the_template_is_refused(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(["check", "recipe.yaml", "data.add_tokens=false"]) == 2
    err = capfd.readouterr().err
    assert "<|im_start|>, <|im_end|>" in err
    assert "data.add_tokens" in err
