"""What the Hugging Face Hub's refusals mean, and the way out of each.

`HF_TOKEN`, `hf auth login`, `HF_HOME` and `HF_HUB_OFFLINE` work as everywhere, since huggingface_hub and the libraries
above it do the asking. Each of them wraps the error below in one of its own, so the whole chain is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tune.errors import did_you_mean
from tune.secrets import redact

NOUNS = {"model": "model", "dataset": "data set"}
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ReadTimeout", "ConnectionError", "TimeoutException"}


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error not in seen:
        seen.append(error)
        yield error
        below = error.__cause__ or error.__context__
        if below is None:
            return
        error = below


def explain(error: Exception, name: str, key: str, *, kind: str = "model", revision: str | None = None) -> str | None:
    """Return one message for an error met while asking the Hub for `name`, or None if it is not about access.

    Args:
        error: what a library raised.
        name: OWNER/NAME.
        key: the recipe's, which the message starts with.
        kind: `model` or `dataset`.
        revision: the one that was asked for.
    """
    chain = list(_chain(error))
    kinds = {base.__name__ for link in chain for base in type(link).__mro__}
    said = " ".join(" ".join(str(link).split()) for link in chain)
    statuses = {getattr(getattr(link, "response", None), "status_code", None) for link in chain}
    noun = NOUNS[kind]
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    if "GatedRepoError" in kinds or "is a gated" in said:
        return (
            f"{key}: {name} is gated, and your account has not been let in. Accept its terms at {page}, then {login}."
        )
    if "RevisionNotFoundError" in kinds or ("Revision" in said and "exist" in said):
        return f"{key}: {name} has no revision {revision or 'main'!r}. See {page}/tree/main for branches and tags."
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or "not a valid model identifier" in said:
        return (
            f"{key}: {name} is neither here nor a {noun} on the Hub, or it is private. Check the name at {page}; "
            f"if it is private, {login}.{near_path(name)}"
        )
    if 401 in statuses:
        return f"{key}: the Hub refused access to {name} (401): your token is missing or not valid; {login}."
    if 403 in statuses:
        return f"{key}: the Hub refused access to {name} (403). Ask for it at {page}, then {login}."
    if kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError", *_UNREACHABLE} or "offline" in said.lower():
        return (
            f"{key}: {name} is neither here nor in the cache, and the Hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set). Check the name, or go online once to fetch it.{near_path(name)}"
        )
    if "HFValidationError" in kinds:
        return f"{key}: {name} is neither here nor a Hub id, which reads OWNER/NAME."
    return None


def transport_error() -> type[Exception]:
    """The base of every error of the Hub client's transport, whichever library its release uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]


def refused_at_once(name: str, key: str, revision: str | None = None) -> str | None:
    """Ask the Hub once for the data set `name` when nothing of it is cached; return a refusal's message, or None.

    The libraries above huggingface_hub ask again and again, for half a minute and aloud, before they say that there
    is no network. Arguments as `explain` takes them.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset") / "snapshots").is_dir():
        return None
    try:
        HfApi().dataset_info(name, revision=revision, timeout=10)
    # What this one question cannot explain, the real request that follows meets again.
    except Exception as error:
        return explain(error, name, key, kind="dataset", revision=revision)
    return None


def near_path(name: str) -> str:
    """OWNER/NAME may have been meant as a path: name the nearest one that is there."""
    path = Path(name)
    return did_you_mean(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""


def one_line(error: BaseException) -> str:
    """What a library said, as a part of one of our own messages."""
    said = re.sub(r"\b\w+Error: ", "", " ".join(redact(str(error)).split()))[:300]
    if isinstance(error, KeyError):  # its text is the key alone
        return f"there is no {said}"
    return said or type(error).__name__
