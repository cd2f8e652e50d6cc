"""Python code that comes with a model runs only by the recipe of whoever types the command, and is shown."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import write_recipe
from tests.hub import standing_in
from tests.security.coded import CONFIG, MODEL, assert_did_not_run, change, marking, ran, write_coded_base
from tests.security.tripwire import run, slow
from tune.data.auto_map import files_of_code

KEY = "model.trust_remote_code"
TARGETS = ["q_proj", "down_proj"]
FILES = f"{CONFIG}, {MODEL}"
TRAIN = ("train", "recipe.yaml")
CHECK = ("check", "recipe.yaml")
PREVIEW = ("preview", "recipe.yaml", "-n", "1")
GENERATE = ("generate", "run", "hi", "--max-new-tokens", "1")
MERGE = ("merge", "run", "--output", "out")
PROVE = ("merge", "run", "--prove")
CONVERT = ("convert", "run", "--to", "per-expert")
PUSH = ("push", "run", "me/name", "--dry-run")
VERBS_ON_A_RUN = (GENERATE, MERGE, PROVE, CONVERT)


def _yes(*words: object) -> str:
    sys.stdout.write(f"ASKED {words}")
    return "y"


@pytest.fixture(autouse=True)
def _somebody_who_says_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks on the terminal is answered yes, every switch in the environment is on, and nothing else changes."""
    monkeypatch.setattr("builtins.input", _yes)
    for name in ("TRUST_REMOTE_CODE", "HF_TRUST_REMOTE_CODE", "TRANSFORMERS_TRUST_REMOTE_CODE", "TUNE_TRUST"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_TRUST_REMOTE_CODE", "1")
    for module in ("utils.hub", "dynamic_module_utils"):
        monkeypatch.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def trained(original: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished, merged run on such a base, made by the key; and what training printed."""
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        folder = tmp_path_factory.mktemp("trained")
        patched.setenv("XDG_STATE_HOME", str(folder / "state"))
        for module in ("utils.hub", "dynamic_module_utils"):
            patched.setattr(f"transformers.{module}.HF_MODULES_CACHE", str(folder / "modules"))
        work = folder / "work"
        work.mkdir()
        shutil.copy(original / "train.jsonl", work)
        write_coded_base(work)
        write_recipe(work, model__trust_remote_code=True, adapter__targets=TARGETS, train__save_every=1)
        done = run(work, *TRAIN)
        assert done.code == 0, done.said
        assert ran(work) == [CONFIG, MODEL]
        merged = run(work, "merge", "run")
        assert merged.code == 0, merged.said
        ran(work)
    return work, done.said


@pytest.fixture
def coded(trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it in the hands of somebody else, who has let none of its code run."""
    work = tmp_path / "work"
    shutil.copytree(trained[0], work)
    for path in work.rglob("*_own.py"):
        path.write_text(path.read_text().replace(str(trained[0]), str(work)))
    # The base with these few changed bytes is the one that was trained on.
    provenance = work / "run/provenance.json"
    from tune.models.hub import fingerprint_base

    monkeypatch.chdir(work)
    old = json.loads(provenance.read_text())
    provenance.write_text(json.dumps({**old, "base": {**old["base"], "fingerprint": fingerprint_base("base")}}))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return work


# Without the key.


@pytest.mark.parametrize("verb", [TRAIN, CHECK])
def test_without_the_key_no_code_runs_and_file_and_key_are_named(verb: tuple[str, ...], coded: Path) -> None:
    write_recipe(coded, adapter__targets=TARGETS, output="new")
    outcome = run(coded, *verb)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2
    assert all(word in outcome.said for word in (CONFIG, MODEL, f"{KEY}: true", "Read it")), outcome.said


def test_a_preview_needs_no_code_of_the_model(coded: Path) -> None:
    write_recipe(coded)
    outcome = run(coded, *PREVIEW)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 0, outcome.said


@pytest.mark.parametrize("value", ["auto", None])
def test_the_key_is_yes_or_no(value: str | None, coded: Path) -> None:
    recipe = yaml.safe_load((coded / "recipe.yaml").read_text())
    recipe["model"]["trust_remote_code"] = value
    (coded / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    outcome = run(coded, *CHECK)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2
    assert KEY in outcome.said


def test_code_for_a_model_that_transformers_knows_is_left_alone_and_said(work: Path) -> None:
    change(work / "base/config.json", auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (work / "base" / MODEL).write_text(marking(work, MODEL))
    change(work / "base/tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})
    (work / "base/tokenization_own.py").write_text(marking(work, "tokenization_own.py"))
    outcome = run(work, "train", "recipe.yaml", "output=new")
    assert_did_not_run(work, outcome)
    assert outcome.code == 0, outcome.said
    assert f"code that came with base does not run ({KEY}: false): {MODEL}" in outcome.said


@pytest.mark.parametrize("kind", ["vit", *slow("clip")])
@pytest.mark.parametrize("verb", [TRAIN, CHECK])
def test_a_class_that_the_config_names_for_another_kind_of_model_is_not_asked_about(
    kind: str, verb: tuple[str, ...], work: Path
) -> None:
    """transformers has the config of such a model and no causal head, and would ask on the terminal."""
    change(work / "base/config.json", model_type=kind, auto_map={"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"})
    (work / "base" / MODEL).write_text(marking(work, MODEL))
    outcome = run(work, *verb, "output=new")
    assert_did_not_run(work, outcome)
    assert outcome.code == 2
    assert MODEL in outcome.said
    assert KEY in outcome.said


def test_a_tokenizer_that_is_code_is_refused_by_its_file(coded: Path) -> None:
    write_recipe(coded)
    change(
        coded / "base/tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    (coded / "base/tokenization_own.py").write_text(marking(coded, "tokenization_own.py"))
    outcome = run(coded, *PREVIEW)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2
    assert "tokenization_own.py" in outcome.said
    assert KEY in outcome.said


@pytest.mark.parametrize(
    "auto_map", [{"AutoTokenizer": ["x"]}, *slow([], [1], 5, "x", {"AutoTokenizer": 5}, {"A": {"B": 1}})]
)
def test_an_auto_map_that_is_none_ends_in_a_message(auto_map: object, work: Path) -> None:
    change(work / "base/tokenizer_config.json", auto_map=auto_map)
    change(work / "base/config.json", auto_map=auto_map)
    outcome = run(work, *CHECK)
    assert_did_not_run(work, outcome)
    assert outcome.code in (0, 2), outcome.said


def test_a_way_of_generating_that_came_with_the_base_does_not_run(work: Path) -> None:
    (work / "base/custom_generate").mkdir()
    (work / "base/custom_generate/generate.py").write_text(marking(work, "generate.py"))
    for command in (GENERATE, ("train", "recipe.yaml", "output=new", "--quiet")):
        outcome = run(work, *command)
        assert_did_not_run(work, outcome)
        assert outcome.code == 0, outcome.said


# With the key, in a recipe of one's own.


def test_with_the_key_it_runs_and_is_shown_before_and_after(trained: tuple[Path, str]) -> None:
    work, said = trained
    line = f"code that came with base runs here ({KEY}: true): {FILES}"
    assert said.index(line) < said.index("RUNNING")
    summary = said[said.index("\nadapter   ") :]
    assert f"base's code  ran, as {KEY} lets it: {FILES}" in summary
    assert yaml.safe_load((work / "run/recipe.yaml").read_text())["model"]["trust_remote_code"] is True
    assert json.loads((work / "run/finished.json").read_text())["own_code"] == FILES
    for card in ("run/adapter/README.md", "run/merged/README.md"):
        text = (work / card).read_text()
        assert "own Python code" in text
        assert "trust_remote_code=True" in text


def test_a_base_without_code_says_nothing_of_it(work: Path) -> None:
    outcome = run(work, "train", "recipe.yaml", "output=new", f"{KEY}=true")
    assert outcome.code == 0, outcome.said
    assert "code" not in outcome.said
    assert "own_code" in json.loads((work / "new/finished.json").read_text())


@pytest.mark.parametrize("verb", [CHECK, PREVIEW])
def test_every_verb_on_a_recipe_says_so_too(verb: tuple[str, ...], coded: Path) -> None:
    outcome = run(coded, *verb)
    assert outcome.code == 0, outcome.said
    assert f"({KEY}: true): {FILES}" in outcome.said
    if "RUNNING" in outcome.said:
        assert outcome.said.index(KEY) < outcome.said.index("RUNNING")


# A run that somebody else made.


@pytest.mark.parametrize("verb", VERBS_ON_A_RUN)
def test_a_runs_code_does_not_run_for_somebody_who_has_not_let_it(verb: tuple[str, ...], coded: Path) -> None:
    outcome = run(coded, *verb)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2
    assert all(word in outcome.said for word in ("run/recipe.yaml", FILES, "tune check run/recipe.yaml")), outcome.said


def test_nor_does_it_for_a_program(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tune.adapters.convert import convert
    from tune.errors import RunError
    from tune.evaluation.generate import load_run
    from tune.export.subject import find_subject

    monkeypatch.chdir(coded)
    for call in (
        lambda: convert("run", "per-expert"),
        lambda: load_run("run"),
        lambda: find_subject("run", "original"),
    ):
        with pytest.raises(RunError, match="you have not let that code run"):
            call()
    assert ran(coded) == []


def test_a_push_runs_none(coded: Path) -> None:
    outcome = run(coded, *PUSH)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 0, outcome.said


def test_what_was_let_run_by_a_recipe_runs_and_is_said_and_changed_code_does_not(coded: Path) -> None:
    line = f"code that came with base runs here ({KEY}: true): {FILES}"
    assert run(coded, "check", "run/recipe.yaml").code == 0
    ran(coded)
    for verb in (GENERATE, MERGE):
        outcome = run(coded, *verb)
        assert outcome.code == 0, outcome.said
        assert outcome.said.index(line) < outcome.said.index("RUNNING")
        assert ran(coded) == [CONFIG, MODEL]
    with (coded / "base" / MODEL).open("a") as file:
        file.write("# harmless\n")
    outcome = run(coded, *GENERATE)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2
    # Nor is it the base that was trained on, for whoever goes on with the training.
    resumed = run(coded, *TRAIN, "train.max_steps=3", "--resume")
    assert resumed.code == 2
    assert "the base has changed" in resumed.said


def test_another_module_beside_the_code_is_a_change_of_it(coded: Path) -> None:
    assert run(coded, *CHECK).code == 0
    ran(coded)
    (coded / "base/extra.py").write_text(marking(coded, "extra.py"))
    outcome = run(coded, *GENERATE)
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2


def test_where_the_note_cannot_be_kept_it_is_said(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (coded / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(coded / "file"))
    outcome = run(coded, *CHECK)
    assert outcome.code == 0, outcome.said
    assert "Set XDG_STATE_HOME" in outcome.said
    assert run(coded, *GENERATE).code == 2


def test_code_that_lies_in_a_runs_adapter_never_runs(coded: Path) -> None:
    """Its tokenizer is read from tokenizer.json, whatever class the folder names."""
    assert run(coded, *CHECK).code == 0
    ran(coded)
    adapter = coded / "run/adapter"
    change(
        adapter / "tokenizer_config.json",
        tokenizer_class="OwnTokenizer",
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
    )
    (adapter / "tokenization_own.py").write_text(marking(coded, "tokenization_own.py"))
    outcome = run(coded, *GENERATE)
    assert outcome.code == 0, outcome.said
    assert ran(coded) == [CONFIG, MODEL]


@pytest.mark.parametrize("place", ["code", *slow("config", "tokenizer")])
def test_code_in_a_merged_model_that_is_not_the_bases_does_not_run(place: str, coded: Path) -> None:
    assert run(coded, *CHECK).code == 0
    ran(coded)
    merged = coded / "run/merged"
    (merged / "evil.py").write_text(marking(coded, "evil.py"))
    if place == "code":
        (merged / MODEL).write_text(marking(coded, "evil.py") + (merged / MODEL).read_text())
    elif place == "config":
        change(merged / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    else:
        change(merged / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    outcome = run(coded, *PROVE)
    assert outcome.code == 3, outcome.said
    assert "is not the base's, and did not run" in outcome.said
    assert "evil.py" not in ran(coded)


def test_a_merged_model_by_itself_runs_no_code(coded: Path) -> None:
    assert run(coded, *CHECK).code == 0
    ran(coded)
    outcome = run(coded, "generate", "run/merged", "hi")
    assert_did_not_run(coded, outcome)
    assert outcome.code == 2
    assert "no code of a model is run" in outcome.said


@pytest.mark.slow
def test_code_of_the_hub_is_known_by_its_commit(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(
        coded, model__base="owner/own", model__trust_remote_code=True, adapter__targets=TARGETS, output="from-the-hub"
    )
    generate = ("generate", "from-the-hub", "hi", "--max-new-tokens", "1")
    with standing_in({"owner/own": coded / "base"}, {}) as hub:
        done = run(coded, *TRAIN, hub=hub)
        assert done.code == 0, done.said
        assert f"code that came with owner/own runs here ({KEY}: true): {FILES}" in done.said
        ran(coded)
        assert run(coded, *generate, hub=hub).code == 0
        assert ran(coded) == [CONFIG, MODEL]
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another"))
        outcome = run(coded, *generate, hub=hub)
        assert_did_not_run(coded, outcome)
        assert outcome.code == 2
        assert "owner/own" in outcome.said


def test_code_of_another_repository_is_named_with_it() -> None:
    entry = {"auto_map": {"AutoConfig": "other/code--configuration_x.C", "AutoModelForCausalLM": "modeling_x.M"}}
    assert files_of_code(entry) == ("other/code: configuration_x.py", "modeling_x.py")
