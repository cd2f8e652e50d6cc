"""Whether this account may publish under a name, and what the Hub's refusals mean.

The token is the one that every tool of the Hub uses: HF_TOKEN, or what `hf auth login` saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tune.data.hub import transport_error
from tune.errors import RunError, did_you_mean
from tune.secrets import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_NEW_TOKEN = "Make one with write access at https://huggingface.co/settings/tokens, then " + LOGIN
PATIENCE = 10
"""Seconds to wait for the first answer, which is not asked for again."""


@dataclass(frozen=True, slots=True)
class Account:
    """Who the token belongs to, and what it may do."""

    name: str
    organisations: dict[str, str | None]
    """Name -> role there, where the Hub says it."""
    role: str | None
    """`read`, `write` or `fineGrained`."""
    scopes: tuple[str, ...] = ()
    """Owners and repositories that a fine-grained token is for."""
    may_write_somewhere: bool = False
    """Whether a fine-grained token has a right to write repositories at all."""


def client(repo: str) -> HfApi:
    """Return a client for the Hub with this user's token; nothing is asked yet.

    Raises:
        RunError: there is no token, or HF_HUB_OFFLINE is set.
    """
    from huggingface_hub import HfApi, constants, get_token, is_offline_mode

    if is_offline_mode():
        raise RunError(
            f"{repo}: HF_HUB_OFFLINE is set, so nothing can be sent. Unset it to publish; --dry-run works without."
        )
    token = get_token()
    if token is None:
        raise RunError(f"{repo}: publishing needs a token, and there is none: {LOGIN}.")
    return HfApi(endpoint=constants.ENDPOINT, token=token)


def find_account(api: HfApi, repo: str) -> Account:
    """Ask the Hub whose token this is.

    Raises:
        RunError: it is refused.
    """
    with asking(repo):
        return _account(api.whoami())


def _account(content: dict[str, Any]) -> Account:
    token = content.get("auth", {}).get("accessToken", {})
    fine = token.get("fineGrained") or {}
    scopes = [scope for scope in fine.get("scoped", ()) if isinstance(scope, dict)]
    rights = [*fine.get("global", ()), *(right for scope in scopes for right in scope.get("permissions", ()))]
    return Account(
        name=str(content.get("name")),
        organisations={str(org.get("name")): org.get("roleInOrg") for org in content.get("orgs", ())},
        role=token.get("role"),
        scopes=tuple(str(scope.get("entity", {}).get("name")) for scope in scopes),
        may_write_somewhere=any(right in ("repo.write", "repo.content.write") for right in rights),
    )


def refuse_without_rights(account: Account, repo: str) -> None:
    """Refuse what the Hub would refuse after hours of training or uploading.

    Args:
        account: whose token it is.
        repo: OWNER/NAME.

    Raises:
        RunError: the token may only read, or the owner is neither the account nor one of its organisations.
    """
    owner = repo.partition("/")[0]
    powerless = account.role == "fineGrained" and not account.may_write_somewhere
    if account.role == "read" or powerless:
        raise RunError(f"{repo}: the token of {account.name} may only read. {_NEW_TOKEN}.")
    owners = (account.name, *account.organisations, *(scope.partition("/")[0] for scope in account.scopes))
    names = {name.lower(): name for name in owners}
    if owner.lower() not in names:
        mine = ", ".join(account.organisations)
        raise RunError(
            f"{repo}: {owner} is neither you ({account.name}) nor an organisation of yours"
            f"{f' ({mine})' if mine else ''}. Give an owner that you may publish under."
            f"{did_you_mean(owner, names.values())}"
        )
    if account.organisations.get(owner) == "read":
        raise RunError(f"{repo}: you may only read in {owner}. Ask one of its admins for the right to write.")


@contextmanager
def asking(repo: str, sending: bool = False) -> Iterator[None]:
    """Turn the Hub's refusals and a lost network into one line.

    Args:
        repo: OWNER/NAME.
        sending: whether something is being sent, and not only asked for.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError, transport_error()) as error:
        raise RunError(f"{repo}: {_explained(error, repo, sending)}") from error


def _explained(error: Exception, repo: str, sending: bool) -> str:
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    chain = list(_chain(error))
    again = " The same command goes on where this one stopped." if sending else " Then type the same command again."
    answer = next((link for link in chain if isinstance(link, HfHubHTTPError)), None)
    if answer is not None:
        return _refusal(answer, repo, again)
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return "HF_HUB_OFFLINE is set, so nothing can be sent. Unset it to publish."
    if any(type(link).__module__.startswith(("http", "ssl", "socket")) or _is_network(link) for link in chain):
        met = "the connection to the Hub was lost" if sending else "the Hub cannot be reached"
        return f"{met} ({_said(chain[-1])}). Check the network and HF_ENDPOINT.{again}"
    return f"{_said(chain[-1])}.{again}"


def _refusal(error: Any, repo: str, again: str) -> str:
    status = error.response.status_code
    said = f" The Hub says: {_said(error.server_message)}." if error.server_message else ""
    if status == 401:
        return f"the Hub refused the token (401): it is wrong, expired or was revoked. {_NEW_TOKEN}."
    if status == 403:
        return f"the token may not write there (403).{said} {_NEW_TOKEN}."
    if status == 404:
        return f"was not found on the Hub, or is not yours to see (404).{said} Check the name."
    if status in (409, 412):
        return f"is there already, or was changed meanwhile ({status}).{said} Look at it, then push again."
    if status == 429:
        return f"the Hub asks to wait (429).{said}{again}"
    if status >= 500:
        return f"the Hub has a fault of its own ({status}).{said} Try again later.{again}"
    return f"the Hub refused it ({status}).{said or ' ' + _said(error) + '.'}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    below: BaseException | None = error
    while below is not None and below not in seen:
        seen.append(below)
        yield below
        below = below.__cause__ or below.__context__


def _is_network(error: BaseException) -> bool:
    return isinstance(error, ConnectionError | TimeoutError)


def _said(words: object) -> str:
    """A library's words as a part of one of our own lines."""
    text = " ".join(redact(str(words)).split()).rstrip(".")[:300]
    return text or type(words).__name__
