"""A tokenizer's files, looked at before a library builds something from them.

They come with a base, so somebody else wrote them. The libraries trust them: an id of 10**9 makes a list of so many
entries, a normaliser that puts a thousand letters for each makes texts of gigabytes, and Rust then ends the process
without a word. transformers takes the name of a class from them, and older releases the paths of other files.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune.data.hub import one_line
from tune.errors import ModelError, TuneError
from tune.files.foreign import read_plain
from tune.recipe.read import shown

STATE = "tokenizer.json"
CONFIG = "tokenizer_config.json"

_MI = 1 << 20
# Patterns of the files that libraries look for, and how many bytes each may have; the first that fits counts.
_LARGEST = {
    CONFIG: 16 * _MI,
    "special_tokens_map.json": 16 * _MI,
    "added_tokens.json": 16 * _MI,
    "config.json": 16 * _MI,
    "chat_template*": _MI,
    "additional_chat_templates/*.jinja": _MI,
    **dict.fromkeys(("tokenizer*", "tekken*", "vocab*", "merges*", "*.model", "*.tiktoken"), 256 * _MI),
}

_CLASS = re.compile(r"\w*(Tokenizer|TokenizerFast|Backend)")
_BEYOND = 1 << 16
_WRITES = 64
"""Characters that a normaliser may put for one."""
_PATTERN = 20_000
_TOKEN = 10_000
"""Characters in a pattern, and in an added token."""


@contextmanager
def failures_told(what: str) -> Iterator[None]:
    """Turn whatever a tokenizer's library raises, the panics of its Rust part included, into a ModelError on `what`."""
    try:
        yield
    except TuneError:
        raise
    except Exception as error:
        raise ModelError(f"{what} cannot be used ({one_line(error)}). Copy it again from the original.") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # no Exception, and of no module that could be imported
            raise
        raise ModelError(f"{what} cannot be used ({one_line(error)}). Copy it again from the original.") from None


def check_files(base: str, folder: Path) -> None:
    """Refuse a folder in which a tokenizer's file is no plain file, or far larger than any.

    Raises:
        ModelError: names the file.
    """
    seen = set()
    for pattern, most in _LARGEST.items():
        for path in sorted(folder.glob(pattern)):
            if path in seen or not os.path.lexists(path) or path.is_dir():
                continue
            seen.add(path)
            name = path.relative_to(folder)
            if not path.is_file():
                raise ModelError(f"model.base: {base}/{name} is no plain file. Copy it from the original model.")
            if (size := path.stat().st_size) > most:
                raise ModelError(
                    f"model.base: {base}/{name} has {size / _MI:,.0f} MiB, and such a file at most {most // _MI}. "
                    "Copy it again from the original model."
                )


def check_contents(base: str, state: Path | None, config: Path | None) -> None:
    """Refuse a tokenizer that asks for what none needs.

    Args:
        base: for messages.
        state: its tokenizer.json, if it has one.
        config: its tokenizer_config.json, if it has one.

    Raises:
        ModelError: names the file and what in it.
    """
    for path, check in ((config, _check_config), (state, _check_state)):
        if path is None:
            continue
        where = f"model.base: {base}/{path.name}"
        unread = f"model.base: {base}: its tokenizer cannot be read ({path.name}"
        try:
            content = json.loads(read_plain(path, 256 * _MI, links=True).decode("utf-8"))
        except RecursionError:
            raise ModelError(f"{unread} is nested too deeply). Copy it again from the original model.") from None
        except (OSError, ValueError) as error:
            why = str(error).partition(":")[0] if isinstance(error, json.JSONDecodeError) else error
            raise ModelError(f"{unread}: {why}). Copy it again from the original model.") from None
        if not isinstance(content, dict):
            raise ModelError(f"{where}: holds no JSON object. Copy it again from the original model.")
        for wrong in check(content, path.parent):
            raise ModelError(f"{where}: {wrong}. Copy it again from the original model.")


def check_class(base: str, content: Any) -> None:
    """Refuse a config that names, as a tokenizer's class, one of transformers' that is none: it would be used.

    Raises:
        ModelError: names it.
    """
    kind = content.get("tokenizer_class") if isinstance(content, dict) else None
    if kind is not None and not (isinstance(kind, str) and _CLASS.fullmatch(kind)):
        raise ModelError(
            f"model.base: {base} names {shown(kind)!r} as tokenizer_class, which is no tokenizer. "
            "Copy its files again from the original model."
        )


def _check_config(content: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is wrong with a tokenizer_config.json."""
    longest = content.get("model_max_length")
    counts = type(longest) is int or (type(longest) is float and math.isfinite(longest))
    if longest is not None and not (counts and longest >= 1):
        yield f"model_max_length is {shown(longest)}, and has to be a length in tokens"
    if not _is_template(content.get("chat_template")):
        yield "chat_template is no text, nor texts by name"
    for key, value in content.items():
        if key.endswith("_token") and not (value is None or isinstance(value, str | dict | bool)):
            yield f"{shown(key)} is {shown(value)}, and has to be a token"
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and key not in _NO_PATHS and _leads_out(folder, text):
                yield f"{shown(key)} names a file outside of its folder ({shown(text)})"


# Texts of their own, and what transformers has always replaced by what it found itself.
_NO_PATHS = ("chat_template", "name_or_path", "special_tokens_map_file", "tokenizer_file")


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, dict) and isinstance(one.get("template"), str) and "name" in one for one in value)
    if isinstance(value, dict):
        return all(isinstance(one, str) for one in value.values())
    return value is None or isinstance(value, str)


def _leads_out(folder: Path, value: str) -> bool:
    """Whether a text is the path of a file that lies elsewhere."""
    if "/" not in value or "\0" in value or len(value) > 4096:
        return False
    path = os.path.normpath(os.path.join(folder, value))
    return not path.startswith(f"{os.path.normpath(folder)}/") and os.path.lexists(path)


def _check_state(content: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is wrong with a tokenizer.json."""
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = vocabulary.items() if isinstance(vocabulary, dict) else ()
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        yield "added_tokens is no list of tokens"
        return
    # Gaps are found in good ones, and are small; a list is made as long as the largest id.
    most = _BEYOND + 4 * (len(ids) + len(added))
    for name, number in (*ids, *((token.get("content"), token.get("id")) for token in added)):
        if type(number) is not int or not 0 <= number < most:
            yield f"gives token {shown(name)!r} the id {shown(number)}, far from those of its {len(ids)} tokens"
    for token in added:
        if not isinstance(token.get("content"), str) or not 0 < len(token["content"]) <= _TOKEN:
            yield f"the added token {shown(token.get('id'))} is {shown(token.get('content'))!r}, which is no token"
    growth = 1
    for part in _parts([content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder", "post_processor")]):
        growth *= _growth(part)
        pattern = part.get("pattern")
        searched = pattern.get("Regex") if isinstance(pattern, dict) else None
        if isinstance(searched, str) and len(searched) > _PATTERN:
            yield f"has a pattern of {len(searched)} characters"
        if part.get("type") == "Precompiled" and not _is_charsmap(part.get("precompiled_charsmap")):
            yield "has a damaged precompiled_charsmap"
        if growth > _WRITES:
            yield f"puts more than {_WRITES} characters for one"
            return


def _parts(waiting: list[Any]) -> Iterator[dict[str, Any]]:
    """Every object at any depth."""
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _growth(part: dict[str, Any]) -> int:
    """How many times longer a normaliser makes a text, at most."""
    if part.get("type") == "Prepend":
        return max(1, len(str(part.get("prepend", ""))))
    if part.get("type") != "Replace":
        return 1
    pattern = part.get("pattern")
    searched = pattern.get("String") if isinstance(pattern, dict) else None
    content = len(str(part.get("content", "")))
    # A regular expression may match between any two characters.
    return max(1, -(-content // max(1, len(searched)))) if isinstance(searched, str) else 1 + content


def _is_charsmap(value: Any) -> bool:
    """Whether a SentencePiece normaliser's table is whole: four bytes of the size of its trie, the trie, and texts."""
    if value is None:
        return True
    try:
        raw = base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        return False
    size = int.from_bytes(raw[:4], "little")
    return raw == b"" or (len(raw) >= 4 + size and size % 4 == 0)
