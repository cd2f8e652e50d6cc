"""Which Python files a model's JSON files name as code of its own."""

from __future__ import annotations

from typing import Any


def files_of_code(content: Any) -> tuple[str, ...]:
    """Return the files that the `auto_map` of a config.json or tokenizer_config.json names, each once.

    An entry reads `MODULE.CLASS`, or `OWNER/NAME--MODULE.CLASS` for code of another repository on the Hub, which is
    then written `OWNER/NAME: MODULE.py`. Some tokenizers have two classes, in a list. What reads otherwise is named as
    it is.

    Args:
        content: the parsed file, whatever it holds.
    """
    named = content.get("auto_map") if isinstance(content, dict) else None
    if not named:
        return ()
    waiting, found = [named], []
    while waiting:
        entry = waiting.pop(0)
        if isinstance(entry, dict):
            waiting += entry.values()
        elif isinstance(entry, list):
            waiting += entry
        elif isinstance(entry, str) and entry:
            repository, _, place = entry.rpartition("--")
            module = place.rpartition(".")[0] or place
            found.append(f"{repository}: {module}.py" if repository else f"{module}.py")
        elif entry is not None:
            found.append(repr(entry))
    return tuple(dict.fromkeys(found))
