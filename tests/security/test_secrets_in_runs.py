"""Secrets stay at home: planted in environment, recipe, addresses, comments and data, none is found afterwards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.hub import Account, meet, standing_in
from tests.security.planted import ALL, FOLDERS, KEY, KNOWN, PASSWORD, SECRETS, SHAPE, leaks, plant_recipe
from tests.security.planted import at_home as at_home
from tests.security.planted import base as base
from tests.security.planted import desk as desk
from tests.tiny import write_model
from tests.training.jobs import write_rows
from tests.training.processes import fork, wait, wait_until
from tune.cli.main import _run, main
from tune.folder import RunFolder, whole, write_file, write_folder
from tune.recipe.load import load_recipe
from tune.secrets import HIDDEN
from tune.training.devices import Devices
from tune.training.metrics import Metrics

ROOT = Path(__file__).resolve().parents[2]


def typed(log: Path, *arguments: str) -> str:
    """Type a command in a process of its own, as `tune` runs; return its exit code and all that it printed."""

    def work() -> int:
        try:
            main(list(arguments))
        except SystemExit as end:
            return int(end.code or 0)
        return 1

    log.unlink(missing_ok=True)
    code = wait(fork(work, log))
    return f"exit {code}\n{log.read_text()}"


def test_training_and_its_errors_leave_no_secret_anywhere(desk: Path, tmp_path: Path) -> None:
    write_rows(desk / "eval.jsonl", 6, start=100)
    (desk / "rows.jsonl").write_text((desk / FOLDERS / "train.jsonl").read_text() + json.dumps({"prompt": ALL}) + "\n")
    rows = {"path": str(FOLDERS / "*.jsonl"), "limit": 39}
    plant_recipe(desk, data__eval=0.2, train__save_every=1, data__on_bad="drop")
    printed = typed(tmp_path / "log", "train", "recipe.yaml", "data.train.0.limit=39")
    assert printed.startswith("exit 0\n"), printed
    printed += typed(tmp_path / "log", "train", "recipe.yaml", "data.train.0.limit=39")
    printed += typed(tmp_path / "log", "train", "recipe.yaml", "data.train.0.limit=39", "train.seed=3", "--resume")
    printed += typed(tmp_path / "log", "check", "recipe.yaml", f"data.train={json.dumps([rows, 'rows.jsonl'])}")
    assert [line for line in printed.splitlines() if line.startswith("exit")] == [
        "exit 0",
        "exit 2",
        "exit 2",
        "exit 0",
    ]
    assert "train.seed cannot change on --resume" in printed
    planted = [desk / "recipe.yaml", desk / "rows", desk / "rows.jsonl"]
    assert leaks(desk, tmp_path / "cache", printed, planted_in=planted) == []
    assert HIDDEN in (desk / "run/recipe.yaml").read_text()
    assert "data.train.0.path" in printed
    assert "run/recipe.yaml has *** in the place of a secret" in printed
    assert HIDDEN in json.loads((desk / "run/provenance.json").read_text())["examples"][0]["row"]
    assert "#" not in (desk / "run/recipe.yaml").read_text().partition("model:")[2], "comments stay at home"


def test_a_run_whose_recipe_held_a_secret_goes_on_with_a_new_one(
    desk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _run(["train", "recipe.yaml", "--quiet"]) == 0
    saved = load_recipe("run/recipe.yaml")
    assert HIDDEN in saved.data.train[0].path
    longer = ["train", "recipe.yaml", "--resume", "--quiet"]
    assert _run([*longer, "train.max_steps=3"]) == 0
    for name in (*KNOWN, "HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    rotated = Path("rows", *(f"rotated{number}" for number in range(len(FOLDERS.parts) - 1)))
    shutil.copytree(desk / FOLDERS, desk / rotated)
    assert _run([*longer, "train.max_steps=4", f"data.train=[{rotated}/train.jsonl]"]) == 0
    out, told = capfd.readouterr()
    assert out == ""
    assert {line.partition(":")[0] for line in told.splitlines()} == {"warning"}
    assert told.count("run/recipe.yaml has *** in the place of a secret") == 2
    write_rows(desk / rotated / "train.jsonl", 39)
    assert _run([*longer, "train.max_steps=5", f"data.train=[{rotated}/train.jsonl]"]) == 2
    assert "the data has changed since this run began" in capfd.readouterr().err
    assert _run([*longer, "train.max_steps=5", "data.train=[other/train.jsonl]"]) == 2
    # The adapter is used as ever: nothing that was hidden is needed for it.
    assert _run(["generate", "run", "Say 3 things.", "--max-new-tokens", "4"]) == 0


def test_texts_in_files_lose_their_secrets_and_bytes_stay(at_home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PIN_TOKEN", "12345678")
    numbers = '{"tokens": 12345678, "ids": [12345678]}'
    texts = {
        "a.json": numbers,
        "b.md": ALL,
        "c.json": json.dumps([ALL]),
        "d.jsonl": f'{{"at": "{SHAPE}"}}\n{numbers}\n',
    }
    write_folder(tmp_path / "made", texts, manifest=True)
    assert whole(tmp_path / "made")
    for name, text in texts.items():
        write_file(tmp_path / "made" / f"again-{name}", text)
    assert leaks(tmp_path / "made") == []
    for path in (tmp_path / "made/a.json", tmp_path / "made/again-a.json"):
        assert path.read_text() == numbers
    write_file(tmp_path / "weights", SHAPE.encode())
    assert (tmp_path / "weights").read_bytes() == SHAPE.encode()


def test_metrics_name_rows_without_secrets_and_keep_every_number(at_home: Path, tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path), load_recipe({"model": {"base": "base"}, "data": {"train": "rows"}})
    metrics = Metrics(run, recipe, Devices(), 0)
    kept: list[Any] = []
    metrics._trackers = [SimpleNamespace(log=lambda values, step: kept.append(values), finish=lambda: None)]
    metrics.write({"step": 1, "loss": 0.1 + 0.2, "tokens": 2**40, "examples": [f"{ALL}:1", "rows.jsonl:2"]})
    metrics.close()
    assert leaks(tmp_path, repr(kept), planted_in=[at_home]) == []
    line = json.loads(run.metrics.read_text())
    assert (line["loss"], line["tokens"], line["examples"][1]) == (0.1 + 0.2, 2**40, "rows.jsonl:2")


def test_a_tracker_is_told_no_secret(desk: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    pytest.importorskip("wandb")
    told: list[Any] = []

    def start(tracker: Any) -> None:
        told.extend((tracker.run_name, tracker.init_kwargs))

    def refuse(tracker: Any, values: dict[str, Any]) -> None:
        told.append(values)
        raise ConnectionError(f"key {'x' * 275} {PASSWORD} was refused, and so was {ALL}")

    monkeypatch.setattr(tracking.WandBTracker, "start", start)
    monkeypatch.setattr(tracking.WandBTracker, "store_init_configuration", refuse)
    plant_recipe(desk, tracking__to=["wandb"], tracking__project=f"about {SHAPE}", tracking__name=ALL)
    assert _run(["train", "recipe.yaml", "--quiet"]) == 2
    assert told[0] == f"about {HIDDEN}"
    assert told[2]["tracking.project"] == f"about {HIDDEN}"
    assert leaks(repr(told), *capfd.readouterr(), desk / "run") == []


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
@pytest.mark.parametrize("asked", ["HEAD /owner/private", "GET /api/models/owner/lamps", "GET /api/whoami-v2"])
def test_a_hub_that_refuses_is_quoted_without_the_token(
    asked: str, desk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with standing_in({}, {}) as hub:
        meet(hub, monkeypatch, tmp_path / "home/hf", SECRETS["HF_TOKEN"])
        for status in (401, 403):  # at a 500 the client asks again for half a minute
            hub.refuses, hub.words = {asked: status}, f"the token {SECRETS['HF_TOKEN']} of {ALL} may not"
            plant_recipe(desk, model__base="owner/private", push__repo="owner/lamps")
            assert _run(["train", "recipe.yaml"]) == 2
            plant_recipe(desk, model__base="owner/private")
            assert _run(["train", "recipe.yaml"]) == 2
        assert hub.asked
    out, err = capfd.readouterr()
    assert err.count("\n") == 4
    assert leaks(out, err) == []


def test_a_table_on_a_terminal_is_folded_after_secrets_are_hidden(desk: Path, tmp_path: Path) -> None:
    screen, terminal = os.openpty()

    def work() -> int:
        os.environ.update(COLUMNS="70", TERM="xterm")
        os.dup2(terminal, 1)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  the child's own
        return _run(["check", "recipe.yaml"])

    child = fork(work, tmp_path / "log")
    os.close(terminal)
    shown = b"".join(iter_of(screen)).decode()
    assert wait(child) == 0, (tmp_path / "log").read_text()
    assert "duplicates" in shown
    folded = "".join(part.strip() for part in shown.splitlines())
    assert leaks(shown, folded, (tmp_path / "log").read_text()) == []


def iter_of(screen: int) -> Iterator[bytes]:
    """What is written on a terminal until nobody holds it any more."""
    while True:
        try:
            yield os.read(screen, 4096)
        except OSError:  # how Linux says that the other end is closed
            os.close(screen)
            return


def test_rows_that_hold_a_token_are_counted_and_not_quoted(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}, task-force."} for number in range(40)]
    for number, value in ((3, SHAPE), (17, "-----BEGIN RSA PRIVATE KEY-----\nMIIE"), (30, KEY)):
        rows[number]["output"] = f"Use {value} for it."
    (desk / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (desk / "texts.jsonl").write_text("".join(json.dumps({"text": f"{number} {SHAPE}"}) + "\n" for number in range(9)))
    for _ in range(2):  # the second time from the cache
        assert _run(["check", "recipe.yaml", "data.train=rows.jsonl"]) == 0
        out, err = capfd.readouterr()
        warning = (
            "rows.jsonl (train): 3 of 40 rows hold a text that is shaped like a token or key (first: rows.jsonl:4)."
        )
        assert f"warning: {warning}" in out
        assert leaks(out, err) == []
    assert _run(["check", "recipe.yaml", "data.train=texts.jsonl"]) == 0
    assert "9 of 9 rows hold a text" in capfd.readouterr().out
    assert _run(["check", "recipe.yaml"]) == 0
    assert "shaped like a token" not in capfd.readouterr().out


def test_what_a_person_asked_to_see_is_shown_as_it_is(desk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = {"instruction": "What is the key?", "input": "", "output": f"It is {SHAPE}."}
    (desk / "rows.jsonl").write_text(json.dumps(said) + "\n")
    assert _run(["preview", "recipe.yaml", "data.train=rows.jsonl", "-n", "1"]) == 0
    out, _ = capfd.readouterr()
    assert f"It is {SHAPE}." in out, "what is learnt can be seen"


def tune(*words: str, environment: dict[str, str], expected: int = 0, stop_when: Path | None = None) -> str:
    """Run a command as a person does; return what it printed. It gets a SIGTERM as soon as `stop_when` is there."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tune", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if stop_when is not None:
        wait_until(lambda: stop_when.exists() or process.poll() is not None)
        process.terminate()
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == expected, (words, printed)
    return printed


@pytest.mark.slow
def test_a_whole_life_of_a_run_leaves_no_secret_anywhere(desk: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    shutil.rmtree(desk / "base")
    write_model(desk / "base", "mixtral")
    tracked = {"tracking__to": ["wandb"], "tracking__project": f"about {SHAPE}"}
    plant_recipe(desk, **tracked, data__eval=0.2, train__save_every=1, train__max_steps=300)
    named = f"tracking.name={json.dumps(ALL)}"
    with standing_in({"owner/tiny": desk / "base"}, {}) as hub:
        hub.accounts = {SECRETS["HF_TOKEN"]: Account("owner")}
        # As in a company: the Hub stands behind an address with a password.
        endpoint = hub.endpoint.replace("://", f"://user:{SECRETS['a password in an address']}@")
        variables = {**os.environ, **hub.environment(tmp_path / "home/hf"), "PYTHONPATH": str(ROOT)}
        push = ["--base-model", "owner/tiny"]
        first = desk / "run/checkpoints/step-000002"
        printed = [tune("train", "recipe.yaml", named, environment=variables, expected=143, stop_when=first)]
        for expected, *words in (
            (0, "train", "recipe.yaml", named, "--resume"),
            (2, "train", "recipe.yaml", named),
            (0, "check", "recipe.yaml"),
            (0, "preview", "recipe.yaml", "--json"),
            (0, "generate", "run", "Say 3 things.", "--max-new-tokens", "4"),
            (0, "merge", "run"),
            (0, "merge", "run", "--prove"),
            (0, "generate", "run/merged", "Say 3 things.", "--max-new-tokens", "4"),
            (0, "convert", "run", "--to", "per-expert"),
            (0, "push", "run", "owner/lamps", *push, "--dry-run"),
            (0, "push", "run", "owner/lamps", *push),
            (0, "push", "run", "owner/merged", *push, "--merged"),
        ):
            printed.append(tune(*words, environment=variables, expected=expected))
        variables["HF_ENDPOINT"] = endpoint
        printed.append(tune("push", "run", "owner/lamps", *push, environment=variables, expected=2))
        published = {name: repository.files for name, repository in hub.created.items()}
        summaries = [words for repository in hub.created.values() for words in repository.summaries]
    assert set(published) == {"owner/lamps", "owner/merged"}
    for name, files in published.items():
        for path, content in files.items():
            place = tmp_path / "published" / name / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    planted = [desk / "recipe.yaml", desk / "rows"]
    assert leaks(desk, tmp_path / "cache", tmp_path / "published", *printed, *summaries, planted_in=planted) == []
    tracks = list(desk.glob("run/wandb/offline-*/*.wandb"))
    assert len(tracks) == 2
    assert all(f"about {HIDDEN}".encode() in path.read_bytes() for path in tracks), "what is searched was written"
    elsewhere = [
        path for path in (tmp_path / "home").rglob("*") if path.name not in ("token", "stored_tokens", ".netrc")
    ]
    assert leaks(tmp_path / "home", planted_in=set((tmp_path / "home").rglob("*")) - set(elsewhere)) == []
