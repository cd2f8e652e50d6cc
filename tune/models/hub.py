"""Where a base comes from: a local folder or the Hugging Face Hub, and whether its config describes one we can use.

The config is asked for first, so that a missing right is told before any weight is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune.data.hub import explain, one_line, transport_error
from tune.errors import ModelError, did_you_mean


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' warnings and bars off the console: what they would say is checked, and said in one line."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def fetch(repo: str, name: str, revision: str | None = None, key: str = "model.base") -> Path | None:
    """Return the local path of one file of a Hub repository (downloaded if needed), or None when it has no such file.

    Raises:
        ModelError: the repository cannot be read; the message says why and what to do.
    """
    from huggingface_hub import (
        _CACHED_NO_EXIST,
        constants,
        errors,
        get_session,
        hf_hub_download,
        is_offline_mode,
        try_to_load_from_cache,
    )

    try:
        cached = try_to_load_from_cache(repo, name, revision=revision)
        if cached is _CACHED_NO_EXIST and is_offline_mode():
            return None
        if not isinstance(cached, str) and not is_offline_mode():
            # Fails at once without a network, where fetching a file tries again for half a minute.
            get_session().head(constants.ENDPOINT, timeout=10)
        return Path(hf_hub_download(repo, name, revision=revision))
    except (OSError, errors.HFValidationError, transport_error()) as error:
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            return None
        said = explain(error, repo, key, revision=revision)
        raise ModelError(
            said or f"{key}: {name} of {repo} cannot be fetched ({one_line(error)}). Try again."
        ) from error


def local_folder(base: str, key: str = "model.base") -> Path | None:
    """Return `base` as a folder when it is one here; None when it reads as a Hub id. `key` is the recipe's.

    Raises:
        ModelError: it is a file, or it can only be a path and nothing is there.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{key}: {base} is a file. Give the folder that holds it.")
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"{key}: {base} does not exist.{did_you_mean(path.name, siblings)}")
    return None


def fingerprint_base(base: str, revision: str | None = None) -> str:
    """Return a SHA-256 over the config and samples of the weights' files, by their sizes and places.

    Whole files would take minutes at tens of gigabytes; 16 samples of 64 KiB of each, the header among them, tell
    another checkpoint, another revision and a broken copy.
    """
    folder = local_folder(base)
    digest = hashlib.sha256()
    if folder is None:
        config = fetch(base, "config.json", revision)
        assert config is not None
        digest.update(config.resolve().read_bytes())
        digest.update(config.parent.name.encode())  # a snapshot's folder is named after its commit
        return digest.hexdigest()
    digest.update((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with open(path, "rb") as file:
            for part in range(16):
                file.seek(part * size // 16)
                digest.update(file.read(2**16))
    return digest.hexdigest()


def commit_of(base: str, revision: str | None = None) -> str | None:
    """Return the commit of a Hub base that is in use here; None for a local folder, which has none."""
    if local_folder(base) is not None:
        return None
    config = fetch(base, "config.json", revision)
    return config.parent.name if config is not None else None  # a snapshot's folder is named after its commit


def read_config(base: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a base, and nothing else of it.

    Raises:
        ModelError: there is no model, no access, no causal language model, or only pickled weights.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    folder = local_folder(base)
    path: Path | None
    if folder is not None:
        path = folder / "config.json"
        if not path.is_file():
            raise ModelError(f"model.base: {base} holds no config.json, so it is not a model folder.")
        _refuse_pickles(base, {entry.name for entry in folder.iterdir()})
    else:
        path = fetch(base, "config.json", revision)
        if path is None:
            raise ModelError(f"model.base: {base} on the Hub holds no config.json, so it is not a transformers model.")
    own_code = _check_config(base, path, trust_remote_code)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    # Each model's config class checks its values in its own way, down to a ZeroDivisionError.
    except Exception as error:
        raise ModelError(
            f"model.base: {base} has a config.json that transformers cannot use ({one_line(error)}). "
            "Compare it with the original model's."
        ) from error
    # Encoders have a causal head too, for use as decoders; as they come they look in both directions.
    encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or own_code
    if not known or encoder or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model.base: {base} is a {config.model_type} model, not a causal language model. "
            "Give a base such as mistralai/Mistral-7B-v0.1."
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"model.base: {base} is already quantised. Give the original weights; "
            "model.quantization: nf4 packs them while they load."
        )
    return config


def _check_config(base: str, path: Path, trust_remote_code: bool) -> bool:
    """Refuse a config.json that transformers would answer with a page; return whether the model brings its own code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"model.base: {base}/config.json:{error.lineno}: is not valid JSON ({error.msg}, column {error.colno}). "
            "Copy it again from the original model."
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.base: {base}/config.json cannot be read ({one_line(error)}). Copy it again."
        ) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ModelError(
            f"model.base: {base}/config.json has no model_type, such as mistral, so nothing says what the weights "
            "are. Copy it again from the original model."
        )
    own_code = bool(content.get("auto_map"))
    if own_code and kind not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(
            f"model.base: {base} needs Python code of its own to run ({kind}). Read it, and set "
            "model.trust_remote_code: true only if you trust it."
        )
    if kind not in CONFIG_MAPPING_NAMES and not own_code:
        raise ModelError(
            f"model.base: {base}/config.json says model_type {kind!r}, which this transformers does not know."
            f"{did_you_mean(kind, CONFIG_MAPPING_NAMES) or ' A newer transformers may.'}"
        )
    return own_code


def _refuse_pickles(base: str, names: set[str]) -> None:
    if any(name.endswith(".safetensors") for name in names):
        return
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickles:
        raise ModelError(
            f"model.base: {base} holds only pickled weights ({pickles[0]}), which can run code when read. "
            "Convert them to safetensors first, or use a revision that has them."
        )
    raise ModelError(f"model.base: {base} holds no .safetensors weights. The download or copy may be incomplete.")
