"""Secrets stay at home: what must never stand in a published file, a printed line or an error message.

A secret is known by where it is kept (environment variables whose names end in TOKEN, KEY, SECRET or PASSWORD, and
the tokens that `hf auth login` saved), by its shape (`hf_…`, `sk-…`, `ghp_…`, `AKIA…`, private keys), or by its place
in a URL (`https://user:password@host`, `?token=…`).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

HIDDEN = "***"
SHORTEST = 8
"""Characters; a shorter value of an environment variable is no secret, and would blank out ordinary words."""

_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}"
    r"|sk-(?=[\w-]*\d)[\w-]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abeoprs]-[\w-]{10,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
    r")"
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_IN_URL = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"'<>]+@", re.IGNORECASE)
_IN_QUERY = re.compile(r"([?&][\w-]*(?:token|key|secret|password|signature|sig)=)[^&\s\"'<>)]+", re.IGNORECASE)


def redact(text: str) -> str:
    """Return a text with every secret in it written as `***`."""
    for value in _kept():
        for spelling in {value, json.dumps(value)[1:-1]}:
            text = text.replace(spelling, HIDDEN)
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", text)
    text = _IN_QUERY.sub(rf"\1{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def redact_all(value: Any) -> Any:
    """Redact every text within lists and mappings, keys included."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact_all(key): redact_all(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def holds_secret(content: bytes) -> str | None:
    """Return what secret a file holds that cannot be redacted without breaking it, in words that do not tell it."""
    for value, name in _named().items():
        if value.encode() in content:
            return name
    text = content.decode("utf-8", errors="ignore")
    return "a text shaped like a token or key" if _SHAPES.search(text) or _PRIVATE_KEY.search(text) else None


def _kept() -> list[str]:
    """The secrets of this environment, longest first."""
    return sorted(_named(), key=len, reverse=True)


def _named() -> dict[str, str]:
    """What each secret of this environment is called."""
    found = dict.fromkeys(_saved_tokens(), "a saved token of the Hub")
    found |= {
        value.strip(): f"the value of the environment variable {name}"
        for name, value in os.environ.items()
        if _NAMES.search(name)
    }
    return {value: name for value, name in found.items() if len(value) >= SHORTEST}


def _saved_tokens() -> list[str]:
    """What `hf auth login` saved, read without importing huggingface_hub, which an error message must not wait for."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    # Not Path.expanduser, which raises where there is no home.
    token = Path(os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or f"{home}/token"))
    try:
        found = [token.read_text(encoding="utf-8").strip()]
    except (OSError, ValueError):
        found = []
    try:
        stored = (token.parent / "stored_tokens").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return found
    return found + [line.partition("=")[2].strip() for line in stored.splitlines() if line.startswith("hf_token")]
