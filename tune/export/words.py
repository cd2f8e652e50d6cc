"""What makes weights a model that can be used: config, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tune.errors import ModelError
from tune.export.subject import Subject
from tune.files.foreign import followed, read_plain
from tune.folder import write_file
from tune.models.hub import fetch, local_folder

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")

_LARGEST = 64 * 2**20
"""Bytes of one of them."""


def write_words(folder: Path, subject: Subject) -> None:
    """Write all that is not weights beside the merged weights, but the card and the proof."""
    for name, content in configs(subject).items():
        write_file(folder / name, json.dumps(content, indent=2) + "\n")
    subject.tokenizer.chat_template = subject.chat_template
    subject.tokenizer.save_pretrained(folder)
    saved = folder / "tokenizer_config.json"
    kept = json.loads(saved.read_text(encoding="utf-8"))
    # Where and how it was loaded here says nothing of the tokenizer.
    wanted = {key: value for key, value in kept.items() if key not in ("is_local", "local_files_only", "name_or_path")}
    write_file(saved, json.dumps(wanted, indent=2, ensure_ascii=False) + "\n")
    _copy_beside(folder, subject)


def configs(subject: Subject) -> dict[str, dict[str, Any]]:
    """Return what config.json and generation_config.json of the merged model hold.

    The config is the base's, with room for added tokens. The generation config is the base's too, and ends answers
    where training ended them: a chat template may close an answer with a token that the base has never stopped at.
    """
    config = _json(subject, "config.json")
    assert config is not None
    config.pop("_name_or_path", None)  # where somebody once had it
    if subject.vocabulary != subject.model.vocabulary:
        config["vocab_size"] = subject.vocabulary
    generation = _json(subject, "generation_config.json") or {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None
    }
    generation["eos_token_id"] = answer_ends(subject, generation.get("eos_token_id"))
    return {"config.json": config, "generation_config.json": generation}


def answer_ends(subject: Subject, known: int | list[int] | None) -> int | list[int] | None:
    """The token ids that end an answer: those `known` to the base first, then the template's and the tokenizer's."""
    written = subject.template.end_of_turn
    own = [] if written is None else [subject.tokenizer.convert_tokens_to_ids(written)]
    before = known if isinstance(known, list) else [known]
    found = [end for end in (*before, *own, subject.tokenizer.eos_token_id) if isinstance(end, int)]
    found = list(dict.fromkeys(found))
    return found if len(found) > 1 else found[0] if found else None


def _copy_beside(folder: Path, subject: Subject) -> None:
    """Copy what else belongs to the base: licences, its own code, and the SentencePiece model that converters want."""
    section = subject.recipe.model
    base = local_folder(section.base) or subject.checkpoint.files[0].parent
    patterns = [*_LICENCES, "tokenizer.model"]
    if getattr(subject.config, "auto_map", None):
        patterns.append("*.py")
    for pattern in patterns:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                write_file(folder / path.name, _copied(path))


def _copied(path: Path) -> bytes:
    """The content of a file beside the base's weights: it will be published, so it must be the base's own.

    Raises:
        ModelError: it is a link to something else, or no text.
    """
    try:
        return read_plain(followed(path), _LARGEST)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be copied ({error}). It would be a part of the merged model.") from error


def _json(subject: Subject, name: str) -> dict[str, Any] | None:
    section = subject.recipe.model
    folder = local_folder(section.base)
    path = folder / name if folder is not None else fetch(section.base, name, section.revision)
    if path is None or not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). Copy it again from the original model.") from error
