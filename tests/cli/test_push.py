"""`tune push` as it is typed: what a dry run shows, what a push prints, what is refused."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.mistakes import files
from tests.hub import Account, StandIn, meet, standing_in
from tune.cli.main import _run

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "hf_" + "Wr1te" * 7
SECRET = "correct-horse-battery"
PUSH = ("push", "run", "owner/lamps", "--base-model", "owner/tiny")


@pytest.fixture
def hub(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A Hub where `owner` may write, this process logged in as owner, in the folder of a finished run."""
    with standing_in({"owner/tiny": finished / "base"}, {}) as stand_in:
        stand_in.accounts = {TOKEN: Account("owner")}
        meet(stand_in, monkeypatch, tmp_path / "home", TOKEN)
        monkeypatch.chdir(finished)
        yield stand_in


def test_a_dry_run_shows_all_and_sends_nothing(hub: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    before = files(Path())
    assert _run([*PUSH, "--dry-run", "--private"]) == 0
    out, err = capfd.readouterr()
    assert hub.asked == []
    assert files(Path()) == before
    for words in (
        "would publish the adapter of run as owner/lamps",
        "a new repository would be private",
        "adapter_model.safetensors",
        "base_model: owner/tiny",
        "## How to load it",
        "nothing was sent",
    ):
        assert words in out
    assert "warning: the licence of the base (owner/tiny) is not known" in err
    assert _run(["push", "run", "owner/lamps", "--dry-run"]) == 0
    assert "warning: the base's name on the Hub is not known" in capfd.readouterr().err


@pytest.mark.slow
def test_a_dry_run_in_a_fresh_process_asks_nothing_and_shows_no_secret(finished: Path, tmp_path: Path) -> None:
    with standing_in({"owner/tiny": finished / "base"}, {}) as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "HF_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-m", "tune", *PUSH, "--dry-run"],
            cwd=finished,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert "would publish the adapter of run" in done.stdout
        assert hub.asked == []
        assert TOKEN not in done.stdout + done.stderr


def test_a_push_ends_with_the_address(hub: StandIn, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run([*PUSH]) == 0
    out, err = capfd.readouterr()
    assert "owner/lamps: new, public" in out
    assert "uploading adapter_model.safetensors" in out
    assert out.splitlines()[-1] == f"published  {hub.endpoint}/owner/lamps"
    assert all(line.startswith("warning: ") for line in err.splitlines()), err
    assert _run([*PUSH]) == 0
    assert "nothing to change: already published" in capfd.readouterr().out
    assert _run([*PUSH, "--quiet"]) == 0
    assert capfd.readouterr().out == ""


def test_a_secret_in_what_is_pushed_or_answered_is_shown_nowhere(
    hub: StandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CORP_API_KEY", SECRET)
    run = shutil.copytree("run", tmp_path / "run")
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("system: null", f"system: the word is {SECRET}"))
    push = ("push", str(run), "owner/lamps", "--base-model", "owner/tiny")
    hub.refuses, hub.words = {"POST /api/models/owner/lamps/commit": 403}, f"{TOKEN} with {SECRET} may not"
    assert _run([*push]) == 2
    assert _run([*push, "--dry-run"]) == 0
    hub.refuses = {}
    assert _run([*push]) == 0
    assert _run(["push", "run", f"owner/{SECRET}/{TOKEN}"]) == 2
    out, err = capfd.readouterr()
    assert "*** with *** may not" in err
    assert "the word is ***" in out
    published = b"".join(hub.created["owner/lamps"].files.values()).decode("latin-1")
    assert "the word is ***" in published
    assert SECRET not in out + err + published
    assert TOKEN not in out + err + published


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "run", "lamps"), ["lamps cannot be a repository", "OWNER/NAME"]),
        (("push", "rnu", "owner/lamps"), ["rnu: no such run", "Did you mean 'run'?"]),
        (("push", "base", "owner/lamps"), ["base: not a run folder"]),
        (("push", "run", "owner/lamps", "--merged"), ["run/merged: there is no merged model yet", "`tune merge run`"]),
        (("push", "run", "owner/lamps", "--base-model", "base"), ["--base-model: must read OWNER/NAME", "(base)"]),
        (("push", "run", "other/lamps"), ["other is neither you (owner)"]),
        (("push", "run", "owner/taken"), ["owner/taken: exists already and holds", "--update"]),
    ],
)
def test_what_cannot_be_pushed_is_told_in_one_line(
    hub: StandIn, arguments: tuple[str, ...], words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["models", "other/lamps"] = Path("base").absolute()
    hub.repositories["models", "owner/taken"] = Path("base").absolute()
    assert _run(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 or all(line.startswith("warning") for line in err.splitlines()[:-1]), err
    for word in words:
        assert word in err.splitlines()[-1]
    assert not any(line.startswith(("POST", "PUT")) for line in hub.asked)
