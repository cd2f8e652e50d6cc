"""`adapter.start_from`: the adapter of a run, a folder or the Hub, as the start of a new one."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from tune.adapters.lora import read_adapter
from tune.errors import ModelError
from tune.folder import folder_of
from tune.models.hub import fetch, local_folder


def start_from(source: str, model: PeftModel) -> None:
    """Put the adapter at `source` into the attached one.

    Args:
        source: a run folder, one of its checkpoints, a PEFT folder, or a Hub id.
        model: with an adapter attached, of the same rank, alpha and targets.

    Raises:
        ModelError: there is no such adapter, or it does not fit.
        RunError: the run has no adapter yet.
    """
    folder = local_folder(source, "adapter.start_from")
    if folder is None:
        names = ("adapter_config.json", "adapter_model.safetensors")
        found = {name: fetch(source, name) for name in names}
        for name, path in found.items():
            if path is None:
                raise ModelError(f"adapter.start_from: {source} on the Hub holds no {name}, so it is not an adapter.")
        config = found["adapter_config.json"]
        assert config is not None
        folder = config.parent
    elif not (folder / "adapter_config.json").is_file() and (folder / "recipe.yaml").is_file():
        _, folder = folder_of(folder)
    read_adapter(Path(folder), model)
