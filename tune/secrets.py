"""Secrets stay at home: what must never stand in a file that is written, in a printed line or in an error message.

A secret is known in three ways:

  * By where it is kept: in an environment variable whose name says so, as the password of an address in any variable,
    in what `hf auth login` saved, in a netrc file (where `wandb login` puts its key).
  * By its shape: `hf_…`, `sk-…`, `ghp_…`, `AKIA…`, a JSON web token, a private key, and others unlike words.
  * By its place: `https://user:password@host`, `?token=…`, `Authorization: Bearer …`.

Errors, the files of a run and everything that the command line prints pass through here, so that no caller has to
think of it. Only text does: numbers, weights and token ids are never touched.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "***"
SHORTEST = 8
"""Characters; a shorter value of an environment variable is no secret, and would blank out ordinary words."""
_LONG = 16
"""Characters from which a value is hidden within longer words too; below, only as a word of its own."""

# What a variable of such a name holds is a secret whatever it looks like …
_NAMES = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|_PASS|_PWD"
    r"|(?:API|ACCESS|SECRET|PRIVATE|ENCRYPTION|SIGNING|MASTER|ACCOUNT|CLIENT|AUTH)_?KEY)[_\d]*\Z",
    re.IGNORECASE,
)
# … and of such a name, only if it looks like one: SORT_KEY=learning_rate and TOKEN_LIMIT=100000 are none.
_NAMES_OF_SOME = re.compile(
    r"(?:\A|_)(?:TOKENS?|SECRETS?|PASSWORDS?|CREDENTIALS?|CREDS|PAT|AUTH|LOGIN|PASS|PWD|API_?KEYS?|KEYS?)(?:[_\d]|\Z)|KEY\Z",
    re.IGNORECASE,
)
_RANDOM = re.compile(
    r"(?=[A-Za-z]*\d)(?=\d*[A-Za-z])[A-Za-z0-9]{16,}|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\A[^\s:/]+:[^\s:/]{8,}\Z"
)
_PASSWORD_IN_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://([^/\s:@]*):([^/\s]+)@", re.IGNORECASE)
_IN_NETRC = re.compile(r"\bpassword\s+(\S+)")

_SHAPES = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|hf_(?:oauth|jwt)_(?=[\w.-]*\d)[\w.-]{16,}|api_org_[A-Za-z0-9]{16,}"
    r"|sk-(?:[a-z0-9]+-){0,3}(?=[A-Za-z]*\d)[A-Za-z0-9]{20,}|sk-(?=[\w-]*\d)(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[\w-]{20,}"
    r"|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{20,}|glpat-[\w-]{16,}|wandb_v\d_\w{16,}"
    r"|xox[abeoprs]-[\w-]{10,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{40,}|dckr_pat_[\w-]{16,}|hvs\.[\w-]{20,}"
    r"|gsk_[A-Za-z0-9]{30,}|r8_[A-Za-z0-9]{30,}|nvapi-[\w-]{30,}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"
    r")"
)
_MARKS = (
    *("hf_", "api_org_", "k_live_", "k_test_", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-"),
    *("wandb_v", "xox", "npm_", "pypi-", "dckr_pat_", "hvs.", "gsk_", "r8_", "nvapi-", "AKIA", "ASIA", "AIza", "ya29."),
    *("eyJ", "PRIVATE KEY-----"),
)
"""One of these stands in whatever has such a shape, or `sk-`, as in task-force; to look for them is much faster."""
_SK = re.compile(r"sk-[\w-]{20}")
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_PLACES = (
    # user:password@, or a token in the user's place; git@ and other plain names stay
    re.compile(r"(\b[a-z][a-z0-9+.-]*:/{1,2})(?:[^/\s\"'<>:@]*:[^/\s\"'<>]+|[\w.~%-]{20,})(?=@)", re.IGNORECASE),
    re.compile(
        r"([?&;#][\w-]*(?:token|key|secret|password|passwd|pwd|signature|sig|credential|auth)=)[^&\s\"'<>)]+",
        re.IGNORECASE,
    ),
    re.compile(
        r"(\bauthorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+|\b(?:bearer|basic)\s+(?=\S*\d))[\w.~+/=-]{8,}",
        re.IGNORECASE,
    ),
)
_LITERAL = re.compile(r'"(?:[^"\\]|\\.)*"')
_OUR_KEY = re.compile(r"[a-z_]+")


def redact(text: str) -> str:
    """Return a text with every secret in it written as `***`."""
    kept = _pattern(tuple(_named()))
    if kept is not None:
        text = kept.sub(HIDDEN, text)
    text = _PRIVATE_KEY.sub(HIDDEN, text)
    for place in _PLACES:
        text = place.sub(rf"\1{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def redact_all(value: Any) -> Any:
    """Redact every text within lists and mappings; keys too, unless they read like a name of this program's."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {
            key if isinstance(key, str) and _OUR_KEY.fullmatch(key) else redact_all(key): redact_all(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact_all(inner) for inner in value]
    return value


def redact_json(text: str) -> str:
    """Redact the strings of a JSON text, or of several a line each; its numbers and its layout stay as they are."""
    if redact(text) == text:
        return text
    return _LITERAL.sub(_redact_literal, text)


def _redact_literal(match: re.Match[str]) -> str:
    value = json.loads(match[0])
    if _OUR_KEY.fullmatch(value):
        return match[0]
    hidden = redact(value)
    return match[0] if hidden == value else json.dumps(hidden, ensure_ascii=False)


def holds_secret(content: bytes) -> str | None:
    """Return what secret a file holds that cannot be redacted without breaking it, in words that do not tell it."""
    text = content.decode("utf-8", errors="ignore")
    for value, name in _named().items():
        pattern = _pattern((value,))
        if pattern is not None and pattern.search(text):
            return name
    return "a text shaped like a token or key" if shaped_like_secret(text) else None


def shaped_like_secret(text: str) -> bool:
    """Whether a text holds what has the shape of a token or key; fast enough for a whole data set."""
    if not (any(mark in text for mark in _MARKS) or _SK.search(text)):
        return False
    return bool(_SHAPES.search(text) or _PRIVATE_KEY.search(text))


def secret_in(text: str) -> str | None:
    """Return what secret a text holds, in words that do not tell it."""
    found = holds_secret(text.encode(errors="ignore"))
    if found is None and redact(text) != text:
        return "a password or key in an address"
    return found


def same_but_hidden(before: Any, now: Any) -> bool:
    """Whether plain values are the same, but for what was hidden when `before` was written down."""
    if isinstance(before, str) and isinstance(now, str) and HIDDEN in before:
        return re.fullmatch(".*".join(map(re.escape, before.split(HIDDEN))), now, re.DOTALL) is not None
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(same_but_hidden, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        others = {key: key for key in now} if before.keys() == now.keys() else dict(zip(before, now, strict=False))
        return len(before) == len(now) and all(
            same_but_hidden(key, others[key]) and same_but_hidden(before[key], now[others[key]]) for key in before
        )
    return bool(before == now)


@functools.lru_cache(maxsize=256)
def _pattern(values: tuple[str, ...]) -> re.Pattern[str] | None:
    """What finds these values in any of their spellings, longest first."""
    found = {spelling for value in values for spelling in _spellings(value) if len(spelling) >= SHORTEST}
    parts = []
    for spelling in sorted(found, key=len, reverse=True):
        exact = re.escape(spelling)
        parts.append(exact if len(spelling) >= _LONG else rf"(?<![A-Za-z0-9]){exact}(?![A-Za-z0-9])")
    return re.compile("|".join(parts)) if parts else None


def _spellings(value: str) -> set[str]:
    """A value as it stands in text, in JSON, in Python, in an address, in base64 and on one line."""
    import base64
    from urllib.parse import quote, quote_plus

    quoted = {quote(value), quote(value, safe=""), quote_plus(value)}
    return {
        value,
        " ".join(value.split()),
        json.dumps(value)[1:-1],
        json.dumps(value, ensure_ascii=False)[1:-1],
        repr(value)[1:-1],
        *quoted,
        *(re.sub("%[0-9A-F]{2}", lambda code: code[0].lower(), text) for text in quoted),
        base64.b64encode(value.encode(errors="ignore")).decode(),
    }


def _named() -> dict[str, str]:
    """What each secret of this environment is called.

    It is asked for at every line that is printed, and tests and notebooks change their environment: so it is worked
    out again whenever a variable or a file is another than before.
    """
    return _named_in(tuple(os.environb.items()), tuple(_version(path) for path in _files()))


@functools.lru_cache(maxsize=4)
def _named_in(environment: tuple[tuple[bytes, bytes], ...], files: tuple[tuple[int, int], ...]) -> dict[str, str]:
    token, stored, netrc = map(_read, _files())
    logins = [line.partition("=")[2].strip() for line in stored.splitlines() if line.startswith("hf_token")]
    found = dict.fromkeys((token.strip(), *logins), "a saved token of the Hub")
    found |= dict.fromkeys(_IN_NETRC.findall(netrc), "a password of your netrc file")
    for key, content in environment:
        name = os.fsdecode(key)
        secrets = _secrets_of(name, os.fsdecode(content).strip())
        found |= dict.fromkeys(secrets, f"a secret of the environment variable {name}")
    ordinary = {os.environ.get("USER"), os.environ.get("LOGNAME"), os.uname().nodename}
    return {value: words for value, words in found.items() if len(value) >= SHORTEST and value not in ordinary}


def _secrets_of(name: str, value: str) -> Iterator[str]:
    """What of a variable's value is to be hidden."""
    if "://" in value:
        for address in _PASSWORD_IN_ADDRESS.finditer(value):
            user, password = address.groups()
            yield from (password, f"{user}:{password}", _unquoted(password))
    elif _is_secret(name, value):
        yield value
        yield value.partition(":")[2]  # of user:password


def _is_secret(name: str, value: str) -> bool:
    """Whether a variable's value is a secret, by its name and its looks; the path of a file is none."""
    if len(value) < SHORTEST:
        return False
    if _NAMES.search(name):
        return not (value.startswith(("/", "~", ".")) and os.path.exists(os.path.expanduser(value)))
    return bool(_NAMES_OF_SOME.search(name) and _RANDOM.search(value)) and not value.startswith(("/", "~", "."))


def _unquoted(text: str) -> str:
    if "%" not in text:
        return text
    from urllib.parse import unquote

    return unquote(text)


def _files() -> tuple[str, str, str]:
    """The two files of `hf auth login`, found without huggingface_hub, which no message must wait for; and netrc."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    token = os.environ.get("HF_TOKEN_PATH") or f"{os.environ.get('HF_HOME') or f'{cache}/huggingface'}/token"
    netrc = os.environ.get("NETRC") or "~/.netrc"
    # Not Path.expanduser, which raises where there is no home.
    token = os.path.expanduser(token)
    return token, f"{os.path.dirname(token)}/stored_tokens", os.path.expanduser(netrc)


def _version(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):  # there is none, or it is nobody's token
        return ""
