"""Secrets that are planted in a person's environment and recipe, and the search for them in all that is written."""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from tests.cli.conftest import base as base  # the tiny Mistral, made once
from tests.cli.conftest import write_recipe
from tests.training.jobs import write_rows

SECRETS = {
    "HF_TOKEN": "hf_" + "EnvTok3nQz" * 3 + "Abcd",
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "0ldHubVar7" * 3 + "Efgh",
    "WANDB_API_KEY": "5ad0beef71" * 4,
    "AWS_SECRET_ACCESS_KEY": "wJa1rXUtn/FEMI+K7MDENG/bPxRfiCYPLANTED09",
    "OPENAI_API_KEY": "sk-proj-" + "Pr0jKeyOpenAi" * 3,
    "GITHUB_TOKEN": "ghp_" + "G1tHubTokn" * 3 + "Klmnop",
    "MY_SERVICE_PASSWORD": 'hor"se\\stäple battery 9',
    "DATABASE_URL": "dbPassw0rd-of-tables",
    "HTTPS_PROXY": "pr0xyPassw0rd-planted",
    "DEPLOY_CREDENTIALS": "cr3dentialPart-planted",
    "GITLAB_PAT": "plantedPat0123456789zzyyxx",
    "REDIS_AUTH": "r3disAuthPlanted0123456789",
    "NETRC": "7ce0ffee42" * 4,
    "saved by hf auth login": "hf_" + "Sav3dLogin" * 3 + "Qrst",
    "stored by hf auth login": "hf_" + "St0redLogn" * 3 + "Uvwx",
    # known by their shapes or places alone
    "a token's shape": "hf_" + "ShapeOnly8" * 3 + "Yzab",
    "a key's shape": "sk-ant-api03-" + "Sh4peOfAKey" * 4,
    "a password in an address": "addr3ssPassw0rd",
    "a token in an address": "addr3ssT0kenPlanted",
}
"""By where each is planted. No two have a stretch in common, so that one that is found names its source."""

KNOWN = list(SECRETS)[:15]
"""Those of the environment and its files."""


SHAPE, KEY = SECRETS["a token's shape"], SECRETS["a key's shape"]
ADDRESS = (
    f"https://user:{SECRETS['a password in an address']}@host/rows?v=1&access_token={SECRETS['a token in an address']}"
)
PASSWORD = SECRETS["MY_SERVICE_PASSWORD"]
ALL = " ".join([*(SECRETS[name] for name in KNOWN), SHAPE, KEY, ADDRESS])
FOLDERS = Path("rows", *(SECRETS[name] for name in KNOWN if "/" not in SECRETS[name]), SHAPE, KEY)
"""A path with a folder named after each secret that a folder can be named after."""


def environment(home: Path) -> dict[str, str]:
    """Make a home folder with saved logins, and return the variables of somebody who works there."""
    (home / "hf").mkdir(parents=True, exist_ok=True)
    (home / "hf/token").write_text(SECRETS["saved by hf auth login"])
    (home / "hf/stored_tokens").write_text(f"[work]\nhf_token = {SECRETS['stored by hf auth login']}\n")
    (home / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {SECRETS['NETRC']}\n")
    return {
        **{name: SECRETS[name] for name in KNOWN if name.isupper() and name != "NETRC"},
        "DATABASE_URL": f"postgres://user:{SECRETS['DATABASE_URL']}@host/db",
        "HTTPS_PROXY": f"http://user:{SECRETS['HTTPS_PROXY']}@127.0.0.1:9",
        "DEPLOY_CREDENTIALS": f"user:{SECRETS['DEPLOY_CREDENTIALS']}",
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
    }


def spellings(value: str) -> set[bytes]:
    """A value as it may stand somewhere, and its two ends, which a cut may leave."""
    texts = {
        *(quote(value), quote(value, safe=""), quote_plus(value)),
        *(json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], repr(value)[1:-1]),
        *(base64.b64encode(text.encode()).decode() for text in (value, f"user:{value}")),
        *(value[:12], value[-12:]),
    }
    return {text.encode() for text in texts}


def leaks(*places: Path | str, planted_in: Collection[Path] = ()) -> list[str]:
    """Say of each secret that stands in a text, in a file or in the name of a file, which it is and where.

    Args:
        places: texts, and folders that are searched to the bottom.
        planted_in: files and folders that are left out.
    """
    searched = {value: spellings(value) for value in SECRETS.values()}
    found = []
    for where, content in _contents(places, planted_in):
        for name, value in SECRETS.items():
            found += [f"{name}, as {word!r}, in {where}" for word in searched[value] if word in content]
    return found


def _contents(places: Collection[Path | str], planted_in: Collection[Path]) -> Iterator[tuple[str, bytes]]:
    for place in places:
        if isinstance(place, str):
            yield f"what was printed:\n{place}", place.encode()
            continue
        for folder, _, names in os.walk(place):
            for path in (Path(folder, name) for name in names):
                if not any(path == other or other in path.parents for other in planted_in):
                    yield f"the name {path}", os.fsencode(path.relative_to(place))
                    if path.is_file():
                        yield str(path), path.read_bytes()


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Somebody's home folder and environment, secrets in both."""
    for name, value in environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    return tmp_path / "home"


@pytest.fixture
def desk(at_home: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that such a person works in: base/, rows/…/train.jsonl and a recipe that mentions every secret."""
    desk = tmp_path / "desk"
    shutil.copytree(base, desk / "base")
    (desk / FOLDERS).mkdir(parents=True)
    write_rows(desk / FOLDERS / "train.jsonl", 40)
    monkeypatch.chdir(desk)
    monkeypatch.setenv("TUNE_CACHE", str(tmp_path / "cache"))
    plant_recipe(desk)
    return desk


def plant_recipe(desk: Path, **changes: object) -> None:
    """Write recipe.yaml with secrets in the data's path and in comments."""
    write_recipe(desk, data__train=[str(FOLDERS / "train.jsonl")], **changes)
    comments = "".join(f"# {value}\n" for value in SECRETS.values())
    (desk / "recipe.yaml").write_text(comments + (desk / "recipe.yaml").read_text())
