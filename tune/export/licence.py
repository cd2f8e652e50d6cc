"""Under what licence a base or a data set comes, as its own card or LICENSE file says, and what that means for us.

Nothing here is legal advice: it carries the licence on and warns where a person has to read it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tune.files.foreign import read_plain

_LARGEST = 2**20
"""Bytes of a card or a licence."""
_TEXTS = {
    r"Apache License\s+Version 2\.0": "apache-2.0",
    r"LLAMA 2 COMMUNITY LICENSE": "llama2",
    r"META LLAMA 3 COMMUNITY LICENSE": "llama3",
    r"LLAMA 3\.1 COMMUNITY LICENSE": "llama3.1",
    r"LLAMA 3\.2 COMMUNITY LICENSE": "llama3.2",
    r"LLAMA 3\.3 COMMUNITY LICENSE": "llama3.3",
    r"Gemma Terms of Use": "gemma",
    r"BigScience RAIL License": "bigscience-bloom-rail-1.0",
    r"\bMIT License\b|Permission is hereby granted, free of charge, to any person": "mit",
}
"""How the beginning of a LICENSE file reads, and the Hub's name for it."""

_OF_THEIR_OWN = re.compile(r"other|llama.*|gemma|deepfloyd.*|fair-noncommercial.*|intel-research|apple.*|openmdw.*")
"""Licences that ask for a notice, a name or the acceptance of terms."""


@dataclass(frozen=True, slots=True)
class Licence:
    """A licence by the Hub's name (`apache-2.0`); with `other`, its own name and where it can be read."""

    identifier: str | None = None
    name: str | None = None
    link: str | None = None

    @property
    def known(self) -> bool:
        """Whether anything says what the licence is."""
        return self.identifier not in (None, "unknown")

    @property
    def words(self) -> str:
        """The licence in a sentence."""
        return self.name or self.identifier or "unknown"


def find_licence(folder: Path | None, name: str | None, kind: str, revision: str | None, online: bool) -> Licence:
    """Return the licence of a base or data set.

    Args:
        folder: where it lies on this machine, or None.
        name: its OWNER/NAME on the Hub, or None.
        kind: `model` or `dataset`.
        revision: of the Hub repository.
        online: whether the Hub may be asked; otherwise only what is cached is read.
    """
    if folder is not None:
        found = _from_folder(folder)
        if found.known:
            return found
    card = _hub_card(name, kind, revision, online) if name is not None else None
    return _from_card(card) if card is not None else Licence()


def card_licence(folder: Path) -> Licence:
    """What the front matter of a folder's README.md says."""
    try:
        return _from_card(_text(folder / "README.md"))
    except (OSError, ValueError):
        return Licence()


def _from_folder(folder: Path) -> Licence:
    found = card_licence(folder)
    if found.known:
        return found
    for path in sorted(folder.glob("LICEN[CS]E*")):
        try:
            beginning = _text(path)[:2000]
        except (OSError, ValueError):
            continue
        for pattern, identifier in _TEXTS.items():
            if re.search(pattern, beginning):
                return Licence(identifier)
        return Licence("other", path.name)
    return Licence()


def _text(path: Path) -> str:
    return read_plain(path, _LARGEST, links=True).decode("utf-8", errors="replace")


def _from_card(text: str) -> Licence:
    front = front_matter(text)
    identifier = front.get("license")
    if isinstance(identifier, list):
        identifier = identifier[0] if identifier else None
    if not isinstance(identifier, str):
        return Licence()
    name, link = front.get("license_name"), front.get("license_link")
    return Licence(identifier.lower(), name if isinstance(name, str) else None, link if isinstance(link, str) else None)


def front_matter(text: str) -> dict[str, Any]:
    """The YAML at the top of a card; empty when there is none that can be read."""
    match = re.match(r"\ufeff?\s*---\r?\n(.*?)\r?\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _hub_card(name: str, kind: str, revision: str | None, online: bool) -> str | None:
    """The card of a Hub repository, from the cache or else from the Hub; None where there is none to be had."""
    from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Every error of the client's transport, under whichever name this release of it has for its library.
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        path = try_to_load_from_cache(name, "README.md", revision=revision, repo_type=kind)
        if not isinstance(path, str):
            if not online or is_offline_mode():
                return None
            path = hf_hub_download(name, "README.md", revision=revision, repo_type=kind, etag_timeout=10)
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, HFValidationError, transport):
        return None  # private, gone or unreachable: its licence is not known, which is said


def licence_warnings(base: Licence, base_words: str, data: Mapping[str, Licence]) -> list[str]:
    """What a person has to know before publishing something made of this base and these data sets."""
    found = []
    if not base.known:
        found.append(
            f"the licence of {base_words} is not known. Read it before you publish, and write it into the card."
        )
    found += _of(base, f"the base ({base_words})")
    for name, licence in data.items():
        if not licence.known:
            found.append(f"the licence of the data set {name} is not known. Read it before you publish.")
        found += _of(licence, f"the data set {name}")
        if re.search(r"-sa\b|^a?l?gpl|^odbl", licence.identifier or "") and licence.identifier != base.identifier:
            found.append(f"the data set {name} is under {licence.words}, which may ask for the same licence here.")
    return found


def _of(licence: Licence, whose: str) -> list[str]:
    identifier = f"{licence.identifier or ''} {licence.name or ''}".lower()
    found = []
    if re.search(r"\bnc\b|non-?commercial|research-only", identifier):
        found.append(f"{whose} is under {licence.words}, which forbids commercial use of what is made from it.")
    if re.search(r"\bnd\b|no-?deriv", identifier):
        found.append(f"{whose} is under {licence.words}, which forbids to pass on what is made from it.")
    if _OF_THEIR_OWN.fullmatch(licence.identifier or ""):
        where = f" ({licence.link})" if licence.link else ""
        found.append(
            f"{whose} is under a licence of its own, {licence.words}{where}. It may ask for a notice, for a name, "
            "or for the acceptance of its terms: read it, and add what it asks for."
        )
    return found
