"""A run's adapter in the other layout of experts, in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save

from tune.adapters.files import AdapterFiles, Layout, read_files
from tune.adapters.layout import expert_names, to_per_expert, to_stock
from tune.errors import RunError
from tune.files.foreign import read_plain
from tune.files.pickles import refuse_foreign
from tune.folder import ADAPTER_FILES, MANIFEST, explain_os_errors, folder_of, write_folder
from tune.folder.places import refuse_foreign_folder
from tune.models.catalog import family_of
from tune.models.hub import read_config
from tune.models.own_code import refuse_unknown_code
from tune.recipe.load import load_recipe

_NOT_THE_ADAPTER = {"optimizer.safetensors", "state.json", MANIFEST}
"""What a checkpoint holds besides."""

_LARGEST = 256 * 2**20
"""Bytes of one of the texts that go along."""


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter in another layout."""

    source: Path
    folder: Path
    files: AdapterFiles


def convert(path: str | Path, to: Layout) -> Converted:
    """Write a run's adapter per expert into RUN/adapter-per-expert, or that one back into RUN/adapter-stock.

    Of a checkpoint, the folders' names end in its step. What else lies beside the adapter (tokenizer, chat template,
    model card) goes along. An adapter of that name that is already there is replaced; anything else there is refused.

    Args:
        path: a run folder, or one of its checkpoints.
        to: the layout to write.

    Raises:
        RunError: there is no run, nothing to convert, or no room for it.
        ModelError: the adapter is damaged, or holds what the other layout cannot; by name.
    """
    run, adapter = folder_of(path)
    section = load_recipe(run.recipe).model
    refuse_unknown_code(run, section)
    ending = "" if adapter == run.adapter else f"-{adapter.name}"
    apart = run.root / f"adapter-per-expert{ending}"
    if to == "per-expert":
        source, target = adapter, apart
    else:
        source, target = apart, run.root / f"adapter-stock{ending}"
        if not source.is_dir():
            raise RunError(
                f"{path}: its adapter is in stock PEFT's layout already ({adapter}), and there is no {apart.name} to "
                "convert back. --to per-expert writes that one."
            )
    refuse_foreign(source)  # all that lies there goes along
    for folder in (source, target):
        refuse_foreign_folder(folder)
    if target.is_dir() and not (target / ADAPTER_FILES[0]).is_file():
        raise RunError(f"{target}: is there already, and is no adapter that could be written anew. Move it away.")
    files = read_files(source)
    if files.layout == to == "per-expert":
        raise RunError(f"{source}: is in the per-expert layout already. Use it as it is.")
    family = family_of(read_config(section.base, section.revision, section.trust_remote_code))
    names = expert_names(family, source)
    files = to_per_expert(files, names) if to == "per-expert" else to_stock(files, names)
    beside = {
        entry.name: read_plain(entry, _LARGEST)
        for entry in sorted(source.iterdir())
        if entry.is_file() and entry.name not in (*_NOT_THE_ADAPTER, *ADAPTER_FILES)
    }
    written: dict[str, bytes | str] = {
        **beside,
        "adapter_config.json": json.dumps(files.config, indent=2, sort_keys=True) + "\n",
        "adapter_model.safetensors": save(dict(sorted(files.tensors.items())), metadata={"format": "pt"}),
    }
    with explain_os_errors(target):
        write_folder(target, written)
    return Converted(source, target, files)
