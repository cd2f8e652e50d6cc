"""`tune generate` and `tune chat` with a whole model in the place of a run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.cli.mistakes import Mistake, assert_refused, change_json, cut_in_half, mistake, remove, write
from tests.tiny import write_model, write_tokenizer
from tune.cli.main import _run

TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
SHORT = ("--max-new-tokens", "8")
GENERATE = ("generate", "model", "hi")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `tune merge` leaves: weights, tokenizer, chat template and proof."""
    with contextlib.redirect_stderr(io.StringIO()):
        folder = write_model(tmp_path_factory.mktemp("whole") / "model", "mistral", seed=3)
    write_tokenizer(folder, TEMPLATE)
    (folder / "merge-proof.json").write_text("{}")
    return folder


@pytest.fixture
def here(work: Path, whole: Path, finished: Path) -> Path:
    """A working directory with the model in model/, a run in run/, and the model again where a merge puts it."""
    shutil.copytree(finished / "run", work / "run")
    shutil.copytree(whole, work / "run/merged")
    shutil.copytree(whole, work / "model")
    return work


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[str, str]:
    """Output and errors of a command that succeeds."""
    assert _run([*arguments, *SHORT]) == 0
    return capfd.readouterr()


def test_generate_answers(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer, err = said(capfd, *GENERATE)
    assert err == ""
    assert answer.strip()
    assert said(capfd, "generate", str(here / "model"), "hi") == (answer, ""), "greedy, and by any path"
    assert said(capfd, *GENERATE, "--system", "Be brief.")[0] != answer


def test_a_run_that_was_merged_still_answers_with_its_adapter(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("recipe.yaml", "adapter"):
        assert (here / "run" / name).exists()
    adapted, merged = said(capfd, "generate", "run", "hi")[0], said(capfd, "generate", "run/merged", "hi")[0]
    assert merged == said(capfd, *GENERATE)[0]
    assert adapted != merged
    shutil.rmtree("run/merged")
    Path("run/config.json").write_text("{}")
    assert said(capfd, "generate", "run", "hi") == (adapted, "")


def test_a_published_model_with_its_recipe_is_a_model(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = said(capfd, *GENERATE)
    shutil.copy("run/recipe.yaml", "model/recipe.yaml")
    assert said(capfd, *GENERATE) == answer


def test_an_unproven_merge_answers_after_a_warning(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, _ = said(capfd, *GENERATE)
    Path("model/UNPROVEN").touch()
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    for arguments in (GENERATE, ("chat", "model")):
        out, err = said(capfd, *arguments, "--quiet")
        assert out == answer
        assert err.startswith("warning: model: the proof of this merge failed (merge-proof.json says how)")
        assert err.count("\n") == 1
    Path("run/merged/UNPROVEN").touch()
    assert said(capfd, "generate", "run", "hi")[1] == "", "the adapter is not the merge"


def test_chat_has_nothing_to_switch(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("/base\n/adapter\nhi\n/help\n/new\nhi\n/quit\nunheard\n"))
    out, err = said(capfd, "chat", "run/merged")
    first, *answers = out.splitlines()
    assert first == "Write a message and press Enter. /new starts over, /quit or Ctrl-D leaves."
    (answer,) = set(answers)
    assert answer + "\n" == said(capfd, *GENERATE)[0]
    switched = (
        "run/merged: is a whole model, so there is no adapter to leave out. "
        "For the base's answer, give the run that it was merged from, run."
    )
    assert err.splitlines() == [switched, switched, "There are /new and /quit."]


WRONG = [
    mistake(
        "no adapter to leave out",
        "model: is a whole model",
        "no adapter to leave out",
        "give the run",
        arguments=(*GENERATE, "--without-adapter"),
    ),
    mistake("nor in a chat", "run/merged", ", run.", arguments=("chat", "run/merged", "--without-adapter")),
    mistake(
        "no chat template",
        "model: not a run folder",
        "it has no chat template",
        "chat_template.jinja",
        arguments=GENERATE,
        prepare=remove("model/chat_template.jinja"),
    ),
    mistake(
        "template broken",
        "template tokenizer:1: is not valid jinja",
        arguments=GENERATE,
        prepare=write("model/chat_template.jinja", "{% for %}"),
    ),
    mistake(
        "neither run nor model",
        "model: not a run folder",
        "recipe.yaml",
        arguments=GENERATE,
        prepare=remove("model/config.json"),
    ),
    mistake("misspelt", "modle: no such run", "Did you mean 'model'?", arguments=("chat", "modle")),
    mistake("prompt and folder swapped", "no such run", arguments=("generate", "Tell me. " * 60, "model")),
    mistake(
        "weights cut",
        "the weights of model cannot be read",
        "incomplete",
        arguments=GENERATE,
        prepare=cut_in_half("model/model.safetensors"),
    ),
    mistake(
        "no weights",
        "model holds no .safetensors",
        arguments=GENERATE,
        prepare=remove("model/model.safetensors"),
    ),
    mistake(
        "config broken",
        "model/config.json:1",
        "valid JSON",
        arguments=GENERATE,
        prepare=write("model/config.json", "{"),
    ),
    mistake(
        "a layer more than weights",
        "the checkpoint of model lacks",
        arguments=GENERATE,
        prepare=change_json("model/config.json", num_hidden_layers=3),
    ),
    mistake(
        "code of its own",
        "model: needs Python code of its own",
        "no code of a model is run",
        arguments=GENERATE,
        prepare=change_json("model/config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"}),
    ),
    mistake(
        "no tokenizer",
        "model: has no tokenizer",
        arguments=GENERATE,
        prepare=remove("model/tokenizer*"),
    ),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_refused(wrong: Mistake, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    err = assert_refused(wrong, here, capfd)
    assert "model.base" not in err


def test_a_template_in_the_tokenizers_config_counts(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer, _ = said(capfd, *GENERATE)
    Path("model/chat_template.jinja").unlink()
    config = json.loads(Path("model/tokenizer_config.json").read_text())
    Path("model/tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    assert said(capfd, *GENERATE) == (answer, "")
