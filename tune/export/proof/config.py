"""The config part of a proof: what no tensor and no token shows, such as where generation stops, is the base's."""

from __future__ import annotations

import json
from pathlib import Path

from tune.export.subject import Subject
from tune.export.words import configs


def check_configs(subject: Subject, folder: Path, reasons: list[str]) -> None:
    """Compare both configs with what they should hold, key by key; add to `reasons` what is wrong."""
    if subject.recipe.model.trust_remote_code and not subject.trusts(folder):
        reasons.append("config: the Python code beside it is not the base's, and did not run")
    for name, wanted in configs(subject).items():
        try:
            found = dict(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            reasons.append(f"config: {name} cannot be read ({error})")
            continue
        different = sorted(
            key for key in wanted.keys() | found.keys() if key not in found or found[key] != wanted.get(key, ...)
        )
        if different:
            reasons.append(f"config: {name} is not the base's in {', '.join(different)}")
