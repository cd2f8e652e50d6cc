"""A stand-in of the Hugging Face Hub's HTTP interface on 127.0.0.1, for huggingface_hub's real client."""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StandIn:
    """Serves folders as repositories and notes what was asked."""

    def __init__(self, models: dict[str, Path], datasets: dict[str, Path]) -> None:
        self.repositories = {("models", name): path for name, path in models.items()}
        self.repositories |= {("datasets", name): path for name, path in datasets.items()}
        self.asked: list[str] = []
        self.endpoint = ""

    def environment(self, home: Path) -> dict[str, str]:
        """What a process needs to meet this Hub and no other."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def _files(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": str(path.relative_to(folder)),
            "size": path.stat().st_size,
            "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]


def _handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            if parts[0] == "api":
                self._api(parts[1], "/".join(parts[2:4]), parts[4:])
                return
            kind = "datasets" if parts[0] == "datasets" else "models"
            rest = parts[1:] if kind == "datasets" else parts
            folder = hub.repositories.get((kind, "/".join(rest[:2])))
            if folder is None:
                self._refuse("RepoNotFound")
                return
            file = folder / "/".join(rest[4:])
            if not file.is_file():
                self._refuse("EntryNotFound")
                return
            self._send(file.read_bytes(), {"ETag": f'"{hashlib.sha1(file.read_bytes()).hexdigest()}"'})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            path = urllib.parse.urlsplit(self.path).path
            hub.asked.append(f"POST {path}")
            parts = path.strip("/").split("/")
            folder = hub.repositories.get((parts[1], "/".join(parts[2:4])))
            if folder is None or "paths-info" not in parts:
                self._refuse("RepoNotFound")
                return
            given = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
            wanted = set(given.get("paths", []))
            self._json([entry for entry in _files(folder) if entry["path"] in wanted])

        def _api(self, kind: str, repo: str, rest: list[str]) -> None:
            folder = hub.repositories.get((kind, repo))
            if folder is None:
                self._refuse("RepoNotFound")
            elif rest and rest[0] == "tree":
                below = "/".join(rest[2:])
                entries = [entry for entry in _files(folder) if entry["path"].startswith(below)]
                if below and not entries:
                    self._refuse("EntryNotFound")
                else:
                    self._json(entries)
            else:
                files = [{"rfilename": entry["path"]} for entry in _files(folder)]
                answer = {"id": repo, "sha": COMMIT, "siblings": files, "private": False, "gated": False}
                self._json({**answer, "disabled": False, "downloads": 0, "likes": 0, "tags": []})

        def _json(self, value: Any) -> None:
            self._send(json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _send(self, content: bytes, headers: dict[str, str]) -> None:
            start, end = 0, len(content)
            asked = self.headers.get("Range")
            if asked:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, end = int(first), min(int(last or end - 1) + 1, end)
            self.send_response(206 if asked else 200)
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


@contextmanager
def standing_in(models: dict[str, Path], datasets: dict[str, Path]) -> Iterator[StandIn]:
    """A Hub that holds these repositories, for as long as the block runs."""
    hub = StandIn(models, datasets)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
