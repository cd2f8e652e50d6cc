"""Where a base comes from: a local folder or the Hugging Face Hub, and what the Hub's refusals mean.

`HF_TOKEN`, `hf auth login`, `HF_HOME` and `HF_HUB_OFFLINE` work as everywhere, since huggingface_hub does the
asking. The config is asked for first, so that a missing right is told before any weight is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tune.errors import ModelError, did_you_mean


def explain(error: Exception, repo: str) -> str:
    """Return one message for what huggingface_hub raised about `repo`, with the way out."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repo}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo}: this model is gated and your account has not been let in. Accept its terms at {page}, "
            "then log in with `hf auth login` or set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: the Hub has no such revision of it. See {page}/tree/main for its branches and tags."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: no such model on the Hub, or it is private. Check the name, or log in with "
            "`hf auth login` or set HF_TOKEN if it is private. For a local folder, check the path."
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{repo}: not in the local cache, and the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set). "
            "Connect once, or point model.base at a local folder."
        )
    if isinstance(error, errors.HFValidationError):
        return f"{repo}: neither a folder here nor a Hub id. A Hub id reads OWNER/NAME."
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{repo}: the Hub refused access ({status}). Accept its terms at {page} and log in with `hf auth login`."
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{repo}: the Hub could not be asked ({first}). Check the network, or use a local folder."


def fetch(repo: str, name: str, revision: str | None = None) -> Path | None:
    """Return the local path of one file of a Hub repository (downloaded if needed), or None when it has no such file.

    Raises:
        ModelError: the repository cannot be read; the message says why and what to do.
    """
    import httpx
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(explain(error, repo)) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, httpx.HTTPError) as error:
        raise ModelError(explain(error, repo)) from error


def local_folder(base: str, key: str = "model.base") -> Path | None:
    """Return `base` as a folder when it is one here; None when it reads as a Hub id. `key` is the recipe's.

    Raises:
        ModelError: it is a file, or it can only be a path and nothing is there.
    """
    path = Path(base).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{key}: {base} is a file. Give the folder that holds the config and the weights.")
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"{key}: {base} does not exist.{did_you_mean(path.name, siblings)}")
    return None


def read_config(base: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a base, and nothing else of it.

    Raises:
        ModelError: there is no model, no access, no causal language model, or only pickled weights.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    folder = local_folder(base)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ModelError(f"model.base: {base} holds no config.json, so it is not a model folder.")
        _refuse_pickles(base, {path.name for path in folder.iterdir()})
    elif fetch(base, "config.json", revision) is None:
        raise ModelError(f"model.base: {base} on the Hub holds no config.json, so it is not a transformers model.")
    try:
        config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError) as error:
        first = (str(error).strip().splitlines() or ["unreadable"])[0]
        remedy = " Set model.trust_remote_code only if you trust its code." if "trust_remote_code" in first else ""
        raise ModelError(f"model.base: {base} has a config.json that transformers cannot use ({first}).{remedy}") from error
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or bool(getattr(config, "auto_map", None))
    if not known or getattr(config, "is_encoder_decoder", False):
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
