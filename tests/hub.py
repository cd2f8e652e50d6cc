"""A stand-in of the Hugging Face Hub's HTTP interface on 127.0.0.1, for huggingface_hub's real client.

It serves folders as repositories, and takes what the client publishes: whose token it is, a new repository, large
files in the LFS way (ask, PUT, verify), a commit as lines of JSON. A commit is taken whole or not at all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ("*.safetensors", "*.bin", "*.model")
_IDENTIFIER = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Repository:
    """A repository that was created through the interface."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=lambda: {".gitattributes": b"*.safetensors filter=lfs\n"})
    commits: list[str] = field(default_factory=lambda: [hashlib.sha1(b"initial").hexdigest()])
    summaries: list[str] = field(default_factory=list)


@dataclass
class Account:
    """Whose a token is, and what it may do: `read`, `write` or `fineGrained`."""

    name: str
    role: str = "write"
    organisations: tuple[str, ...] = ()
    rights: tuple[str, ...] = ()


class StandIn:
    """Serves folders as repositories and notes what was asked."""

    def __init__(self, models: dict[str, Path], datasets: dict[str, Path]) -> None:
        self.repositories = {("models", name): path for name, path in models.items()}
        self.repositories |= {("datasets", name): path for name, path in datasets.items()}
        self.asked: list[str] = []
        self.endpoint = ""
        self.accounts: dict[str, Account] = {}
        """By token; while empty, nothing needs one."""
        self.created: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        """The store of large files, by SHA-256."""
        self.puts: list[str] = []
        """The large files that arrived whole, in order."""
        self.cut_off: set[str] = set()
        """Large files, by SHA-256, whose upload breaks off in the middle."""
        self.refuses: dict[str, int] = {}
        """The beginning of `METHOD /path` -> status."""
        self.words = "as the test wants it"
        """What a refusal says."""

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to meet this Hub and no other."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def files(self, kind: str, name: str) -> dict[str, bytes | Path] | None:
        """What a repository holds, or None where there is none."""
        if kind == "models" and name in self.created:
            return dict(self.created[name].files)
        folder = self.repositories.get((kind, name))
        if folder is None:
            return None
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def commit(self, name: str) -> str:
        """The newest commit of a repository."""
        return self.created[name].commits[-1] if name in self.created else COMMIT


def _bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _is_large(path: str) -> bool:
    return any(Path(path).match(pattern) for pattern in LARGE)


def _oid(path: str, content: bytes) -> str:
    """As the Hub names a content: by SHA-256 if it is large, else as git does."""
    if _is_large(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entries(files: dict[str, bytes | Path]) -> list[dict[str, Any]]:
    return [
        {"type": "file", "path": path, "size": len(_bytes(content)), "oid": _oid(path, _bytes(content))}
        for path, content in files.items()
    ]


def card_errors(card: str) -> list[str]:
    """What the Hub would have against a card's front matter."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [str(error)]
    if not isinstance(front, dict):
        return ["there is no front matter"]
    found = [key for key in ("license", "library_name", "pipeline_tag") if not isinstance(front.get(key, ""), str)]
    listed = [front.get("base_model", []), front.get("datasets", [])]
    names = [name for value in listed for name in (value if isinstance(value, list) else [value])]
    found += [f"{name!r} is no repository" for name in names if not _IDENTIFIER.fullmatch(str(name))]
    if front.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        found.append("base_model_relation")
    if front.get("license") == "other" and "license_name" not in front:
        found.append("license_name is missing")
    return found


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _enter(self) -> str | None:
            """Note the request; return its path, or None when it was refused."""
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            for beginning, status in hub.refuses.items():
                if hub.asked[-1].startswith(beginning):
                    self._json({"error": hub.words}, status)
                    return None
            if self.headers.get("Authorization") and hub.accounts and self._account() is None:
                self._json({"error": "Invalid credentials in Authorization header"}, 401)
                return None
            return path

        def _account(self) -> Account | None:
            return hub.accounts.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

        def _may_see(self, name: str) -> bool:
            return name not in hub.created or not hub.created[name].private or self._account() is not None

        def do_GET(self) -> None:
            path = self._enter()
            if path is None:
                return
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "whoami-v2"]:
                self._whoami()
                return
            if parts[0] == "api":
                self._api(parts[1], "/".join(parts[2:4]), parts[4:])
                return
            kind = "datasets" if parts[0] == "datasets" else "models"
            rest = parts[1:] if kind == "datasets" else parts
            name = "/".join(rest[:2])
            files = hub.files(kind, name)
            if files is None or not self._may_see(name):
                self._refuse("RepoNotFound")
                return
            file = "/".join(rest[4:])
            if file not in files:
                self._refuse("EntryNotFound")
                return
            content = _bytes(files[file])
            self._send(content, {"ETag": f'"{_oid(file, content)}"', "X-Repo-Commit": hub.commit(name)})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = self._enter()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            if path is None:
                return
            parts = path.strip("/").split("/")
            if path == "/api/validate-yaml":
                errors = [{"message": words} for words in card_errors(json.loads(body)["content"])]
                self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
            elif path == "/api/repos/create":
                self._create(json.loads(body))
            elif path.endswith(".git/info/lfs/objects/batch"):
                self._batch(json.loads(body))
            elif path == "/lfs-verify":
                self._json({}, 200 if json.loads(body)["oid"] in hub.objects else 404)
            elif "preupload" in parts or "commit" in parts:
                self._publish("/".join(parts[2:4]), parts[4], body)
            else:
                self._paths_info(parts, body)

        def _paths_info(self, parts: list[str], body: str) -> None:
            files = hub.files(parts[1], "/".join(parts[2:4]))
            if files is None or "paths-info" not in parts:
                self._refuse("RepoNotFound")
                return
            given = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
            wanted = set(given.get("paths", []))
            self._json([entry for entry in _entries(files) if entry["path"] in wanted])

        def do_PUT(self) -> None:
            if self._enter() is None:
                return
            oid = self.path.rpartition("/")[2]
            length = int(self.headers["Content-Length"])
            if oid in hub.cut_off:
                self.rfile.read(length // 2)
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            content = self.rfile.read(length)
            assert hashlib.sha256(content).hexdigest() == oid
            hub.objects[oid] = content
            hub.puts.append(oid)
            self._json({})

        def _whoami(self) -> None:
            account = self._account()
            if account is None:
                self._json({"error": "Invalid username or password."}, 401)
                return
            token: dict[str, Any] = {"displayName": "test", "role": account.role}
            if account.role == "fineGrained":
                scope = {"entity": {"type": "user", "name": account.name}, "permissions": list(account.rights)}
                token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": [scope]}
            orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in account.organisations]
            auth = {"type": "access_token", "accessToken": token}
            self._json({"type": "user", "name": account.name, "orgs": orgs, "auth": auth})

        def _may_write(self, owner: str) -> bool:
            account = self._account()
            if account is None:
                self._json({"error": "Invalid username or password."}, 401)
            elif account.role == "read" or owner not in (account.name, *account.organisations):
                message = f'You don\'t have the rights to create a model under the namespace "{owner}"'
                self._json({"error": message}, 403)
            else:
                return True
            return False

        def _create(self, given: dict[str, Any]) -> None:
            name = f"{given['organization']}/{given['name']}"
            if not self._may_write(given["organization"]):
                return
            if name in hub.created or ("models", name) in hub.repositories:
                self._json({"error": "You already created this model repo"}, 409)
                return
            hub.created[name] = Repository(private=given.get("visibility") == "private" or bool(given.get("private")))
            self._json({"url": f"{hub.endpoint}/{name}", "name": name, "id": name})

        def _batch(self, given: dict[str, Any]) -> None:
            objects = []
            for wanted in given["objects"]:
                answer = {"oid": wanted["oid"], "size": wanted["size"]}
                if wanted["oid"] not in hub.objects:
                    places = {"upload": f"{hub.endpoint}/lfs/{wanted['oid']}", "verify": f"{hub.endpoint}/lfs-verify"}
                    answer["actions"] = {verb: {"href": place} for verb, place in places.items()}
                objects.append(answer)
            self._json({"transfer": "basic", "objects": objects})

        def _publish(self, name: str, verb: str, body: str) -> None:
            if not self._may_write(name.partition("/")[0]):
                return
            if name not in hub.created:
                self._refuse("RepoNotFound")
            elif verb == "preupload":
                held = hub.created[name].files
                files = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                        "oid": _oid(file["path"], held[file["path"]]) if file["path"] in held else None,
                    }
                    for file in json.loads(body)["files"]
                ]
                self._json({"files": files})
            else:
                self._commit(name, [json.loads(line) for line in body.splitlines()])

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            repository = hub.created[name]
            files = dict(repository.files)
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit", repository.commits[-1]) != repository.commits[-1]:
                self._json({"error": "A commit has happened since."}, 412)
                return
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            repository.files = files
            repository.summaries.append(header["summary"])
            repository.commits.append(hashlib.sha1(json.dumps(lines).encode()).hexdigest())
            oid = repository.commits[-1]
            self._json({"commitUrl": f"{hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "hookOutput": ""})

        def _api(self, kind: str, repo: str, rest: list[str]) -> None:
            files = hub.files(kind, repo)
            if files is None or not self._may_see(repo):
                self._refuse("RepoNotFound")
            elif rest and rest[0] == "tree":
                below = "/".join(rest[2:])
                entries = [entry for entry in _entries(files) if entry["path"].startswith(below)]
                if below and not entries:
                    self._refuse("EntryNotFound")
                else:
                    self._json(entries)
            else:
                private = repo in hub.created and hub.created[repo].private
                siblings = [{"rfilename": path} for path in files]
                answer = {"id": repo, "sha": hub.commit(repo), "siblings": siblings, "private": private}
                self._json({**answer, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []})

        def _json(self, value: Any, status: int = 200) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
            start, end = 0, len(content)
            asked = self.headers.get("Range")
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last or end - 1) + 1, end)
            self.send_response(206 if asked else status)
            for name, value in {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", **headers}.items():
                self.send_header(name, value)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[start:end])

        def log_message(self, *arguments: object) -> None:
            """Nothing on stderr."""

    return Handler


class _Server(ThreadingHTTPServer):
    def handle_error(self, *arguments: object) -> None:
        """A client that went away is no news."""


@contextmanager
def standing_in(models: dict[str, Path], datasets: dict[str, Path]) -> Iterator[StandIn]:
    """A Hub that holds these repositories, for as long as the block runs."""
    hub = StandIn(models, datasets)
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def meet(hub: StandIn, patch: Any, home: Path, token: str | None) -> None:
    """Let huggingface_hub's client in this process meet this Hub and no other; `patch` is pytest's monkeypatch."""
    from huggingface_hub import constants, hf_api

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
    patch.setenv("HF_HOME", str(home))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template.replace(constants.ENDPOINT, hub.endpoint))
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    patch.setattr(hf_api.api, "endpoint", hub.endpoint)
