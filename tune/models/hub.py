"""Where a base comes from: a local folder or the Hugging Face Hub, and whether its config describes one we can use.

The config is asked for first, so that a missing right is told before any weight is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tune.data.auto_map import files_of_code
from tune.data.hub import explain, one_line, transport_error
from tune.data.tokenizer_files import check_class
from tune.errors import ModelError, did_you_mean
from tune.files.foreign import read_plain
from tune.files.pickles import pickles_among, refuse_disguised
from tune.models.sizes import check_layers, check_numbers

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""What a base's weights are read from, the first before the second."""
_LONGEST_CONFIG = 16 * 2**20
"""Bytes of a config.json."""


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
        start = "" if path.is_absolute() else " Paths start at the working directory, those of a run's recipe too."
        raise ModelError(f"{key}: {base} does not exist.{did_you_mean(path.name, siblings)}{start}")
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
    content = (folder / "config.json").read_bytes()
    digest.update(content)
    # Its own code, if it has some, is a part of what is trained.
    for path in sorted(folder.rglob("*.py")) if files_of_code(json.loads(content)) else ():
        digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes() + b"\0")
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
        _check_files(base, folder)
    else:
        path = fetch(base, "config.json", revision)
        if path is None:
            raise ModelError(f"model.base: {base} on the Hub holds no config.json, so it is not a transformers model.")
        _check_hub_files(base, revision)
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
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (own_code and trust_remote_code)
    if not known or encoder or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"model.base: {base} is a {config.model_type} model, not a causal language model. "
            "Give a base such as mistralai/Mistral-7B-v0.1."
        )
    _choose_implementations(config)
    if folder is not None:
        check_layers(base, folder, config)
    return config


def _choose_implementations(config: Any) -> None:
    """Forget the kernels that a config.json asks for: transformers may fetch them from the Hub, and attention is ours.

    `eager` and `sdpa` are transformers' own code, and a base may be right with one of them alone.
    """
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None
    config._experts_implementation = None


def _check_config(base: str, path: Path, trust_remote_code: bool) -> bool:
    """Refuse a config.json that transformers would answer with a page; return whether the model brings its own code."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        content = json.loads(read_plain(path, _LONGEST_CONFIG, links=True).decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"model.base: {base}/config.json:{error.lineno}: is not valid JSON ({error.msg}, column {error.colno}). "
            "Copy it again from the original model."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"model.base: {base}/config.json cannot be read ({one_line(error)}). Copy it again."
        ) from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise ModelError(
            f"model.base: {base}/config.json has no model_type, such as mistral, so nothing says what the weights "
            "are. Copy it again from the original model."
        )
    _refuse_settings(base, content)
    check_numbers(base, content)
    code = files_of_code(content)
    if not (code and trust_remote_code):
        check_class(base, content)
    if code and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(
            f"model.base: {base} needs Python code of its own to run ({kind}: {', '.join(code)}), and nobody has said "
            "that it may. Read it, and set model.trust_remote_code: true only if you trust it."
        )
    if kind not in CONFIG_MAPPING_NAMES and not code:
        raise ModelError(
            f"model.base: {base}/config.json says model_type {kind!r}, which this transformers does not know."
            f"{did_you_mean(kind, CONFIG_MAPPING_NAMES) or ' A newer transformers may.'}"
        )
    return bool(code)


def _refuse_settings(base: str, content: dict[str, Any]) -> None:
    """Refuse what a config.json may ask of transformers beside describing a model, in whatever depth."""
    weights = content.get("transformers_weights")
    if weights not in (None, SINGLE, INDEX):
        raise ModelError(
            f"model.base: {base}/config.json names its weights ({weights!r}), and they are read from {SINGLE} or "
            f"{INDEX} alone. Take transformers_weights out of it."
        )
    for key, value in _everywhere(content):
        if key in ("quantization_config", "compression_config") and value is not None:
            raise ModelError(
                f"model.base: {base} is already quantised ({key} in its config.json). Give the original weights; "
                "model.quantization: nf4 packs them while they load."
            )
        asks = key.strip("_").removesuffix("_internal") in ("attn_implementation", "experts_implementation")
        if asks and "/" in json.dumps(value):
            raise ModelError(
                f"model.base: {base}/config.json asks for a kernel from the Hub ({key}: {json.dumps(value)}), which "
                "is code that would be fetched and run. Take the key out of it: attention is chosen here."
            )


def _everywhere(content: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    waiting = [content]
    while waiting:
        inner = waiting.pop()
        if isinstance(inner, dict):
            yield from inner.items()
            waiting += inner.values()
        elif isinstance(inner, list):
            waiting += inner


def _check_files(base: str, folder: Path) -> None:
    """Refuse a local folder whose weights are pickles, by whatever name, or that is an adapter as well."""
    from tune.models.shards import weight_map  # which needs this module

    names = {entry.name for entry in folder.iterdir()}
    if SINGLE in names:
        refuse_disguised(folder / SINGLE, "model.base")
    elif INDEX in names:
        for shard in sorted(set(weight_map(folder / INDEX).values())):
            refuse_disguised(folder / shard, "model.base")
    else:
        _refuse_pickles(base, names)
    _refuse_adapter(base, "adapter_config.json" in names)


def _check_hub_files(base: str, revision: str | None) -> None:
    """Refuse a Hub base whose weights are pickles, or that is an adapter as well, before anything else is fetched.

    transformers would ask a service to convert the pickles, and take weights from whatever answers it.
    """
    from tune.models.shards import weight_map  # which needs this module

    names = _names_on_hub(base, revision)
    if not names & {SINGLE, INDEX} and pickles_among(names):
        _refuse_pickles(base, names)
    if INDEX in names and SINGLE not in names and (index := fetch(base, INDEX, revision)) is not None:
        weight_map(index)
    _refuse_adapter(base, "adapter_config.json" in names)


def _names_on_hub(base: str, revision: str | None) -> set[str]:
    """The files of a Hub base; offline, those of them that are in the cache."""
    from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache

    if not is_offline_mode():
        with suppress(Exception):  # what this question meets, the requests for the files themselves meet and explain
            unchanging = re.fullmatch("[0-9a-f]{40}", revision or "")
            ask = _listed if unchanging else _listed.__wrapped__
            return set(ask(constants.ENDPOINT, base, revision))
    config = try_to_load_from_cache(base, "config.json", revision=revision)
    return {path.name for path in Path(config).parent.iterdir()} if isinstance(config, str) else set()


@cache
def _listed(endpoint: str, base: str, revision: str | None) -> frozenset[str]:
    """The files of a repository; of a commit they are asked for once."""
    from huggingface_hub import HfApi

    found = HfApi(endpoint).model_info(base, revision=revision, timeout=10).siblings
    return frozenset(file.rfilename for file in found or ())


def _refuse_adapter(base: str, is_one: bool) -> None:
    if is_one:
        raise ModelError(
            f"model.base: {base} holds an adapter (adapter_config.json) beside its weights, and it is not said whether "
            "it belongs to them. Merge it into them, or take it out; adapter.start_from continues an adapter."
        )


def _refuse_pickles(base: str, names: set[str]) -> None:
    """Refuse a base without the safetensors that are looked for; pickles are named."""
    pickles = [name for name in pickles_among(names) if name != "training_args.bin"]
    if pickles:
        raise ModelError(
            f"model.base: {base} holds only pickled weights ({pickles[0]}), which can run code when read. "
            "Convert them to safetensors first, or use a revision that has them."
        )
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise ModelError(f"model.base: {base} holds no .safetensors weights. The download or copy may be incomplete.")
