"""`push:` in a recipe: train, merge, prove and publish in one go, and what is said when a part of it cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.export.published import TOKEN
from tests.hub import Account, StandIn, meet, standing_in
from tests.training.jobs import tiny_recipe
from tune.errors import RunError
from tune.progress import Progress
from tune.run import train

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Heard(Progress):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with standing_in({}, {}) as stand_in:
        stand_in.accounts = {TOKEN: Account("owner")}
        meet(stand_in, monkeypatch, tmp_path / "home", TOKEN)
        yield stand_in


def published(hub: StandIn, name: str = "owner/lamps") -> dict[str, bytes]:
    files = hub.files("models", name)
    assert files is not None
    return {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in files.items()}


def test_training_ends_with_a_proven_merge_on_the_hub(tmp_path: Path, hub: StandIn) -> None:
    heard = Heard()
    recipe = tiny_recipe(tmp_path, train__max_steps=2, push__repo="owner/lamps", push__merged=True)
    run = train(recipe, progress=heard)
    files = published(hub)
    assert files["model.safetensors"] == (tmp_path / "run/merged/model.safetensors").read_bytes()
    assert files["adapter/adapter_model.safetensors"] == (run.adapter / "adapter_model.safetensors").read_bytes()
    assert json.loads(files["merge-proof.json"])["verdict"] == "proven"
    assert heard.lines[-1].startswith("published http")
    assert heard.lines[-1].endswith("/owner/lamps")

    asked = len(hub.asked)
    again = Heard()
    assert train(recipe, resume=True, progress=again).already
    assert len(hub.asked) == asked, "a finished run is not published again"
    (line,) = [line for line in again.lines if "not published again" in line]
    assert "push" in line
    assert "owner/lamps" in line


def test_a_token_that_may_not_write_stops_the_run_before_it_begins(tmp_path: Path, hub: StandIn) -> None:
    hub.accounts[TOKEN] = Account("owner", role="read")
    with pytest.raises(RunError, match="owner/lamps"):
        train(tiny_recipe(tmp_path, train__max_steps=2, push__repo="owner/lamps"))
    assert not (tmp_path / "run").exists()


def test_a_hub_that_is_gone_at_the_end_leaves_a_finished_run_and_a_command(tmp_path: Path, hub: StandIn) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=2, push__repo="owner/lamps")

    class Leaving(Heard):
        def steps(self, done: int, total: int) -> None:
            hub.accounts.clear()  # the token is revoked while the run trains

    with pytest.raises(RunError) as caught:
        train(recipe, progress=Leaving())
    (message,) = caught.value.problems
    assert "finished" in message
    assert "push" in message
    assert "owner/lamps" in message
    assert (tmp_path / "run/finished.json").is_file()
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_a_merge_that_cannot_be_written_says_how_to_go_on(tmp_path: Path, hub: StandIn) -> None:
    recipe = tiny_recipe(tmp_path, train__max_steps=2, push__repo="owner/lamps", push__merged=True)

    class Blocking(Heard):
        def steps(self, done: int, total: int) -> None:
            (tmp_path / "run/merged").mkdir()

    with pytest.raises(RunError) as caught:
        train(recipe, progress=Blocking())
    assert "is there already" in str(caught.value)
    assert "The run is finished, and not published." in str(caught.value)
    assert hub.files("models", "owner/lamps") is None
