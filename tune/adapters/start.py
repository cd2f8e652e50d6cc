"""`adapter.start_from`: the adapter of a run, a folder or the Hub, as the start of a new one."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tune.adapters.files import read_config_of, read_shapes
from tune.errors import ModelError
from tune.files.foreign import read_object
from tune.files.pickles import refuse_foreign
from tune.folder import MANIFEST, folder_of
from tune.models.hub import fetch, local_folder
from tune.recipe.read import shown

_LARGEST_TOKENIZER = 256 * 2**20
"""Bytes."""


def find_start(source: str) -> Path:
    """Return the PEFT folder that `adapter.start_from` means, downloaded if need be, before any weight is loaded.

    Args:
        source: a run folder, one of its checkpoints, a PEFT folder, or a Hub id.

    Raises:
        ModelError: there is no such adapter.
        RunError: the run has no adapter yet.
    """
    folder = local_folder(source, "adapter.start_from")
    if folder is None:
        from huggingface_hub import is_offline_mode

        names = ("adapter_config.json", "adapter_model.safetensors")
        found = {name: fetch(source, name, key="adapter.start_from") for name in names}
        for name, path in found.items():
            if path is None:
                raise ModelError(
                    f"adapter.start_from: {source} on the Hub holds no {name}, so it is not an adapter that is read: a "
                    "pickled one never is."
                )
        config = found["adapter_config.json"]
        assert config is not None
        with contextlib.suppress(ModelError) if is_offline_mode() else contextlib.nullcontext():
            fetch(source, "tokenizer.json", key="adapter.start_from")  # says what its added tokens are, if it has some
        folder = config.parent
    elif not (folder / "adapter_config.json").is_file() and (folder / "recipe.yaml").is_file():
        _, folder = folder_of(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"adapter.start_from: {source} holds no adapter_config.json, so it is neither a run nor a PEFT adapter."
        )
    if (folder / MANIFEST).is_file():
        refuse_foreign(folder)
    read_config_of(folder)
    read_shapes(folder)  # a pickle is told before any weight of the base is loaded
    return folder


def check_start_tokens(folder: Path, added: dict[str, int]) -> None:
    """Refuse an adapter to start from whose trained rows belong to other tokens of the same ids.

    Args:
        folder: from `find_start`. What it adds is known where a tokenizer lies beside the adapter.
        added: what this recipe adds, by name.

    Raises:
        ModelError: names the first that differs.
    """
    try:
        listed = read_object(folder / "tokenizer.json", _LARGEST_TOKENIZER, links=True)["added_tokens"]
        theirs = {int(token["id"]): str(token["content"]) for token in listed}
    except (OSError, ValueError, TypeError, KeyError):  # none, or one that says nothing of it
        return
    for name, token in added.items():
        if theirs.get(token, name) != name:
            raise ModelError(
                f"adapter.start_from: in {folder} the added token {token} is {shown(theirs[token])}, and this recipe's "
                f"templates make it {name}. Give the recipe the data.template that it was trained with."
            )
