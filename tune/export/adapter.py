"""The adapter folder of a finished run: what stock PEFT reads, with the tokenizer and the template that trained."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tune.folder import write_folder


def write_adapter(folder: Path, checkpoint: Path, tokenizer: Any, chat_template: str, card: str) -> None:
    """Write a whole adapter folder, or nothing.

    Args:
        folder: where; one already there is replaced.
        checkpoint: the checkpoint whose adapter it is.
        tokenizer: the base's.
        chat_template: the jinja form of the template that trained; saved as chat_template.jinja.
        card: the text of its README.md.
    """
    files: dict[str, bytes | str] = {
        name: (checkpoint / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    tokenizer.chat_template = chat_template
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files |= {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
    write_folder(folder, {**files, "README.md": card})
