"""Publishing, met by a stand-in of the Hub on 127.0.0.1 and by huggingface_hub's real client."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.export.published import TOKEN, add_merged, make_run
from tests.hub import Account, StandIn, meet, standing_in
from tune.errors import RunError
from tune.export.licence import find_licence
from tune.export.publication import build_publication, find_source, run_identity
from tune.export.push import check_push, push, push_at_end
from tune.folder import RunFolder
from tune.recipe.schema import Push

# huggingface_hub's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "owner/lamps"
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base/ and a finished run/ that has a merged/ too."""
    folder = tmp_path_factory.mktemp("published")
    run = make_run(folder)
    add_merged(run, folder / "base")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunFolder:
    """A copy of the run that a test may spoil."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.fixture
def hub(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A Hub where `owner` may write, and this process logged in as owner."""
    with standing_in({"owner/tiny": trained / "base"}, {}) as stand_in:
        stand_in.accounts = {TOKEN: Account("owner", organisations=("the-club",))}
        meet(stand_in, monkeypatch, tmp_path / "home", TOKEN)
        yield stand_in


def publish(run: RunFolder | Path | str, repo: str = REPO, **options: Any) -> list[str]:
    """Push over the stand-in's base; return what was said and warned."""
    lines: list[str] = []
    path = run.root if isinstance(run, RunFolder) else run
    push(path, repo, **{"base_model": "owner/tiny", "say": lines.append, "warn": lines.append, **options})
    return lines


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


ANSWERING = """
import contextlib, io, json, sys
answers = []
for code in json.load(open("snippets.json")):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    answers.append(out.getvalue().strip())
json.dump(answers, open("answers.json", "w"))
"""


@pytest.mark.slow
def test_what_is_published_is_loaded_by_its_own_card_and_answers_as_the_run_did(
    run: RunFolder, hub: StandIn, tmp_path: Path
) -> None:
    from tune.evaluation.generate import load_run

    publish(run)
    publish(run, "owner/lamps-merged", merged=True)
    held = hub.created[REPO].files
    assert set(held) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "tune-run.json",
    }
    assert held["adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    codes = [
        code
        for name in (REPO, "owner/lamps-merged")
        for code in snippets(hub.created[name].files["README.md"].decode())
    ]
    assert len(codes) == 4, "PEFT and transformers, for the adapter and for the merged model"
    (tmp_path / "snippets.json").write_text(json.dumps(codes))
    environment = {**os.environ, **hub.environment(tmp_path / "fresh"), "HF_TOKEN": TOKEN}
    done = subprocess.run(
        [sys.executable, "-c", ANSWERING], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "answers.json").read_text())
    expected = load_run(run.root).answer(QUESTION, max_new_tokens=100)
    assert answers == [expected] * 4
    assert load_run(run.root).answer(QUESTION, adapter=False, max_new_tokens=100) != expected


def test_an_upload_that_broke_off_shows_nothing_and_goes_on(
    run: RunFolder, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    weights = run.merged / "model.safetensors"
    second = run.merged / "model-of-two.safetensors"
    second.write_bytes(weights.read_bytes() + b"\0" * 7)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (second, weights)]
    hub.cut_off = {digests[1]}
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(RunError, match=r"connection to the Hub was lost.*goes on where this one stopped"):
        publish(run, merged=True)
    assert hub.created[REPO].files.keys() == {".gitattributes"}, "half a model must not show"
    assert digests[0] in hub.puts
    before = list(hub.puts)
    hub.cut_off = set()
    publish(run, merged=True)
    assert hub.created[REPO].files["model.safetensors"] == weights.read_bytes()
    assert [oid for oid in hub.puts if oid in before] == before, "what had arrived was sent again"
    assert hub.puts.count(digests[1]) == 1
    assert len(hub.created[REPO].summaries) == 1, "one commit holds it all"


def test_the_same_run_is_updated_and_leaves_nothing_stale(run: RunFolder, hub: StandIn) -> None:
    lines = publish(run)
    assert f"{REPO}: new, public" in lines
    held = hub.created[REPO]
    assert len(held.commits) == 2
    again = push(run.root, REPO, base_model="owner/tiny")
    assert (again.changed, again.removed, len(held.commits)) == (False, (), 2), "an empty commit was made"
    marker = json.loads(held.files["tune-run.json"])
    assert (marker["run"], marker["kind"]) == (run_identity(run), "adapter")
    held.files["tokenizer.model"] = b"of an older push"
    marker["files"].append("tokenizer.model")
    held.files["tune-run.json"] = json.dumps(marker).encode()
    held.files["notes.md"] = b"a person's own"
    lines = []
    assert push(run.root, REPO, base_model="owner/tiny", say=lines.append).removed == ("tokenizer.model",)
    assert any("an earlier push of this run, updated with a new commit" in line for line in lines)
    assert held.files["notes.md"] == b"a person's own"
    assert "tokenizer.model" not in held.files


def test_a_run_is_known_wherever_it_lies_and_when_it_is_made_longer(trained: Path, run: RunFolder) -> None:
    here = run_identity(RunFolder(trained / "run"))
    assert run_identity(run) == here
    text = run.recipe.read_text()
    run.recipe.write_text(text.replace("max_steps: 4", "max_steps: 9").replace(str(trained), "/elsewhere"))
    assert run_identity(run) == here
    run.recipe.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.02"))
    assert run_identity(run) != here


def test_what_something_else_filled_is_written_over_only_as_asked(run: RunFolder, hub: StandIn) -> None:
    publish(run)
    with pytest.raises(RunError, match=r"holds this run's adapter\. .*--update"):
        publish(run, merged=True)
    publish(run, merged=True, update=True)
    held = hub.created[REPO].files
    assert "adapter_config.json" not in held, "transformers would take the repository for an adapter"
    assert "adapter/adapter_config.json" in held
    held["tune-run.json"] = b'{"run": "another"}'
    with pytest.raises(RunError, match=r"another run's adapter"):
        publish(run)
    del held["tune-run.json"]
    with pytest.raises(RunError, match=r"exists already and holds README.md, .* more files\. Give another name"):
        publish(run)


def test_a_private_push_never_lands_in_a_public_repository(run: RunFolder, hub: StandIn) -> None:
    publish(run, private=True)
    assert hub.created[REPO].private
    publish(run, "owner/open")
    with pytest.raises(RunError, match=r"is public already"):
        publish(run, "owner/open", private=True)


def test_a_checkpoint_is_published_as_itself(run: RunFolder, hub: StandIn) -> None:
    publish(run.checkpoint(2))
    held = hub.created[REPO].files
    assert held["adapter_model.safetensors"] == (run.checkpoint(2) / "adapter_model.safetensors").read_bytes()
    assert "after step 2" in held["README.md"].decode()
    assert "optimizer.safetensors" not in held
    shutil.rmtree(run.adapter)
    with pytest.raises(RunError, match=r"holds no tokenizer and template.*--resume"):
        publish(run.checkpoint(2))
    with pytest.raises(RunError, match=r"is not finished.*--resume"):
        publish(run)


@pytest.mark.parametrize(
    ("account", "repo", "words"),
    [
        (Account("owner", role="read"), REPO, "the token of owner may only read.*settings/tokens"),
        (Account("owner", role="fineGrained"), REPO, "may only read"),
        (Account("owner"), "ownr/lamps", "ownr is neither you.*Did you mean 'owner'"),
        (None, REPO, r"refused the token \(401\).*wrong, expired"),
    ],
)
def test_a_token_without_the_right_is_told_before_anything_is_sent(
    run: RunFolder, hub: StandIn, account: Account | None, repo: str, words: str
) -> None:
    hub.accounts = {TOKEN: account} if account is not None else {"another": Account("else")}
    with pytest.raises(RunError, match=words) as caught:
        publish(run, repo)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    assert all(line.startswith(("GET", "HEAD")) for line in hub.asked)


def test_an_organisation_and_a_fine_grained_token_may_publish(run: RunFolder, hub: StandIn) -> None:
    hub.accounts = {TOKEN: Account("owner", "fineGrained", ("the-club",), rights=("repo.write",))}
    publish(run, "the-club/lamps")
    assert "the-club/lamps" in hub.created


@pytest.mark.parametrize(
    ("refused", "status", "words"),
    [
        ("POST /api/repos/create", 403, r"may not write there \(403\).*as the test wants it"),
        (f"POST /api/models/{REPO}/commit", 412, r"changed meanwhile"),
        ("GET /api/whoami-v2", 429, r"asks to wait \(429\)"),
        (f"POST /api/models/{REPO}/commit", 500, r"a fault of its own \(500\).*goes on where"),
        ("POST /api/validate-yaml", 400, r"refused it \(400\).*as the test wants it"),
    ],
)
def test_refusals_of_the_hub_are_told_in_one_line(
    run: RunFolder, hub: StandIn, refused: str, status: int, words: str
) -> None:
    hub.refuses = {refused: status}
    with pytest.raises(RunError, match=words) as caught:
        publish(run)
    assert "\n" not in str(caught.value)


def test_no_way_to_the_hub_is_told_at_once(
    run: RunFolder, hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with standing_in({}, {}) as gone:
        pass
    meet(gone, monkeypatch, tmp_path / "home", TOKEN)
    started = time.monotonic()
    with pytest.raises(RunError, match=r"the Hub cannot be reached.*Check the network"):
        publish(run)
    assert time.monotonic() - started < 5
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match=r"HF_HUB_OFFLINE is set"):
        publish(run)
    meet(hub, monkeypatch, tmp_path / "home", None)
    with pytest.raises(RunError, match=r"there is none: log in with `hf auth login`"):
        publish(run)
    assert not hub.asked


def test_a_hub_that_never_answers_is_not_waited_for(
    run: RunFolder, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr("tune.export.push.PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(RunError, match=r"the Hub cannot be reached"):
            publish(run)


def test_a_merge_that_is_not_proven_is_never_published(run: RunFolder, hub: StandIn) -> None:
    proof = json.loads((run.merged / "merge-proof.json").read_text())
    wrong = [
        ({**proof, "verdict": "failed", "reasons": ["logits: too far"]}, r"not the model that was trained \(logits"),
        ({**proof, "fingerprints": {"adapter": "0" * 64}}, "merged from another adapter"),
        ({**proof, "fingerprints": {"files": {"model.safetensors": "0" * 64}}}, "is not the file that was proven"),
    ]
    for content, words in wrong:
        (run.merged / "merge-proof.json").write_text(json.dumps(content))
        with pytest.raises(RunError, match=words):
            publish(run, merged=True)
    (run.merged / "merge-proof.json").write_text(json.dumps(proof))
    (run.merged / "UNPROVEN").write_text("")
    with pytest.raises(RunError, match=rf"Remove that folder and type `tune merge {run.root}`"):
        publish(run, merged=True)
    shutil.rmtree(run.merged)
    with pytest.raises(RunError, match=rf"no merged model yet\. Type `tune merge {run.root}`"):
        publish(run, merged=True)
    assert not hub.asked


def test_a_secret_and_a_place_of_this_machine_are_in_no_file(
    trained: Path, run: RunFolder, hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = 'pl4nted "secret" value'
    shaped = "hf_" + "Sh4ped" * 6
    monkeypatch.setenv("MY_SERVICE_PASSWORD", secret)
    recipe = run.recipe.read_text()
    planted = f"system: {json.dumps(f'Say {secret} and {shaped}.')}"
    run.recipe.write_text(recipe.replace("system: null", planted))
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("tokenizer_config.json", "name_or_path")):
        config = json.loads((run.adapter / name).read_text())
        config |= {key: f"{trained}/base", "note": f"{secret} at https://me:pw1234@host/x"}
        (run.adapter / name).write_text(json.dumps(config))
    finished = json.loads(run.finished.read_text())
    run.finished.write_text(json.dumps({**finished, "adapter_files": {}}))
    (run.adapter / ".env").write_text(secret)
    (run.adapter / "notes.txt").write_text(secret)
    lines = publish(run)
    published = hub.created[REPO].files
    text = "\n".join([*lines, *(content.decode("latin-1") for content in published.values())])
    for word in (secret, json.dumps(secret)[1:-1], shaped, TOKEN, "pw1234", str(trained), str(run.root.parent)):
        assert word not in text, word
    assert "***" in published["recipe.yaml"].decode()
    assert json.loads(published["adapter_config.json"])["base_model_name_or_path"] == "owner/tiny"
    assert not {".env", "notes.txt"} & published.keys()
    (run.adapter / "chat_template.jinja").write_text(f"{{# {shaped} #}}")
    with pytest.raises(RunError, match=r"chat_template.jinja: holds what looks like a secret"):
        publish(run)


def test_an_adapter_whose_base_has_no_name_is_loaded_over_a_base_that_is_given(trained: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    publication = build_publication(find_source(trained / "run", False), REPO)
    for name, content in publication.files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.read_bytes())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(trained / "base"), tmp_path)
    assert any(parameter.abs().sum() > 0 for name, parameter in model.named_parameters() if "lora_B" in name)


def test_a_licence_is_asked_of_the_hub_only_when_it_may_be(hub: StandIn) -> None:
    def ask(online: bool) -> str | None:
        return find_licence(None, "owner/tiny", "model", None, online).identifier

    assert ask(online=False) is None
    assert not hub.asked
    assert ask(online=True) == "apache-2.0"
    asked = len(hub.asked)
    assert ask(online=False) == "apache-2.0", "from the cache"
    assert len(hub.asked) == asked
    assert find_licence(None, "owner/none", "model", None, online=True).identifier is None


def test_a_dry_run_asks_nothing_of_the_hub(run: RunFolder, hub: StandIn) -> None:
    for merged in (False, True):
        publication = build_publication(find_source(run.root, merged), REPO, base_model="owner/elsewhere")
        assert "# lamps" in publication.card
    assert not hub.asked


def test_a_recipe_is_checked_before_and_pushed_after_training(run: RunFolder, hub: StandIn, tmp_path: Path) -> None:
    section = Push(repo=REPO, private=True)
    check_push(section, RunFolder(tmp_path / "not-begun"))
    publish(run, "owner/open")
    lines: list[str] = []
    pushed = push_at_end(section, run, lines.append, lines.append)
    assert pushed is not None
    assert pushed.url == f"{hub.endpoint}/{REPO}"
    assert hub.created[REPO].private
    check_push(section, run)  # the same run, made longer
    with pytest.raises(RunError, match=r"push.repo: owner/open: is public already.*write push.private: false"):
        check_push(Push(repo="owner/open", private=True), run)
    with pytest.raises(RunError, match=r"push.repo: .*another run's adapter\. Give push.repo another name"):
        check_push(section, RunFolder(tmp_path / "not-begun"))
    hub.refuses = {f"POST /api/models/{REPO}/commit": 500}
    run.recipe.write_text(run.recipe.read_text().replace("log_every: 10", "log_every: 5"))
    with pytest.raises(RunError, match=rf"The run is finished. To publish it: tune push {run.root} {REPO} --private"):
        push_at_end(section, run)
    assert push_at_end(Push(), run) is None
