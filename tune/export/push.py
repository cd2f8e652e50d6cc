"""Publishing on the Hugging Face Hub: one commit that holds everything, or nothing.

Large files go up first, one by one, to the Hub's store; then a single commit makes them, and the small files, a
version of the repository. A push that was interrupted therefore leaves the repository as it was, and the next one
skips what the store already has.

Everything that a person can mend is found before the first byte is sent: the token and what it may do, the owner,
what the repository holds already. A repository that some other run filled is never written over unasked.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.errors import RunError
from tune.export.access import PATIENCE, asking, client, find_account, refuse_without_rights
from tune.export.publication import MARKER, Publication, build_publication, check_name, find_source, run_identity
from tune.folder import RunFolder
from tune.recipe.schema import Push

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LARGE = 2**20
"""Bytes from which a file goes up on its own, before the commit."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "adapter_config.json", "*.gguf")
"""Files of another model that would be loaded instead of, or beside, the new ones if they stayed."""


@dataclass(frozen=True, slots=True)
class Repository:
    """What is at a name on the Hub now."""

    name: str
    exists: bool = False
    private: bool = False
    commit: str | None = None
    files: tuple[str, ...] = ()
    marker: dict[str, Any] | None = None
    """The content of tune-run.json, where there is one."""

    @property
    def content(self) -> list[str]:
        """Its files, but for what the Hub itself puts into a new repository."""
        return sorted(name for name in self.files if name != ".gitattributes")


@dataclass(frozen=True, slots=True)
class Pushed:
    """Where a push ended."""

    url: str
    commit: str
    """The repository's newest commit."""
    changed: bool
    """False when the repository held exactly this already."""
    removed: tuple[str, ...]
    """Files of an earlier content that were taken out."""


def push(
    run: str | Path,
    repo: str,
    *,
    merged: bool = False,
    private: bool = False,
    base_model: str | None = None,
    update: bool = False,
    say: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Publish a run's adapter, or its merged model, on the Hub.

    Args:
        run: a run folder, or one of its checkpoints.
        repo: OWNER/NAME.
        merged: the merged model with the adapter beside it, and not the adapter alone.
        private: whether a new repository is private.
        base_model: the base's name on the Hub, where the recipe has a local folder.
        update: write over a repository that something else filled.
        say: hears what is being done.
        warn: hears what a person should know before others read it.

    Raises:
        RunError: one line that says what is in the way: name, token, rights, network, or what the repository holds.
    """
    check_name(repo)
    source = find_source(run, merged)  # what is wrong on this machine is told first
    api = client(repo)
    found = look(api, repo)
    refuse_without_rights(find_account(api, repo), repo)
    publication = build_publication(source, repo, private=private, base_model=base_model, online=True)
    for warning in publication.warnings:
        warn(warning)
    say(check_free(found, publication.run, publication.kind, private, update))
    return upload(api, publication, found, say)


def look(api: HfApi, repo: str) -> Repository:
    """Ask the Hub what is at a name."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with asking(repo):
        try:
            info = api.model_info(repo, timeout=PATIENCE)
        except RepositoryNotFoundError:
            return Repository(repo)
        files = tuple(sibling.rfilename for sibling in info.siblings or ())
        marker = None
        if MARKER in files:
            with tempfile.TemporaryDirectory() as scratch:
                path = api.hf_hub_download(repo, MARKER, revision=info.sha, cache_dir=scratch)
                marker = _read_marker(Path(path).read_bytes())
    return Repository(repo, True, bool(info.private), info.sha, files, marker)


def _read_marker(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


def check_free(found: Repository, run: str | None, kind: str, private: bool, update: bool) -> str:
    """Return what will happen to the repository, in words.

    Args:
        found: what is there.
        run: the identity of the run to publish, or None when it has not begun.
        kind: `adapter` or `merged`.
        private: whether a private repository was asked for.
        update: whether something else's content may be written over.

    Raises:
        RunError: something else is there, or it is public and private was asked for.
    """
    if not found.exists:
        return f"{found.name}: new, {'private' if private else 'public'}"
    if private and not found.private:
        raise RunError(
            f"{found.name}: is public already, and a push does not change that. Make it private in its settings at "
            f"the Hub, ask for a public one, or give another name."
        )
    shown = "private" if found.private else "public"
    if not found.content:
        return f"{found.name}: empty so far, {shown}"
    ours = found.marker is not None and found.marker.get("run") == run and found.marker.get("kind") == kind
    if ours:
        return f"{found.name}: an earlier push of this run, updated with a new commit, {shown}"
    if update:
        return f"{found.name}: holds something else, written over with a new commit as asked, {shown}"
    raise RunError(
        f"{found.name}: exists already and holds {_what_is_there(found, run)}. Give another name, or write over it "
        "with --update (its history stays)."
    )


def _what_is_there(found: Repository, run: str | None) -> str:
    if found.marker is not None and run is not None and found.marker.get("run") == run:
        return {"adapter": "this run's adapter", "merged": "this run's merged model"}.get(
            str(found.marker.get("kind")), "something else of this run"
        )
    if found.marker is not None:
        return f"another run's {'merged model' if found.marker.get('kind') == 'merged' else 'adapter'}"
    names = found.content
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if len(names) > 3 else "")


def upload(api: HfApi, publication: Publication, found: Repository, say: Callable[[str], None]) -> Pushed:
    """Send a publication.

    Raises:
        RunError: it was refused or cut off; nothing of it can be seen, and the same command goes on.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = publication.repo
    additions = [CommitOperationAdd(name, content) for name, content in publication.files.items()]
    removed = _stale(found, publication)
    with asking(repo, sending=True):
        if not found.exists:
            api.create_repo(repo, private=publication.private)  # one that we cannot see is refused here
        for addition in additions:
            if publication.size(addition.path_in_repo) >= LARGE or addition.path_in_repo.endswith(".safetensors"):
                say(f"uploading {addition.path_in_repo} ({publication.size(addition.path_in_repo) / 1e6:,.1f} MB)")
                api.preupload_lfs_files(repo, [addition])
        commit = api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(name) for name in removed)],
            commit_message=f"Publish the {publication.kind if publication.kind == 'adapter' else 'merged model'}",
            parent_commit=found.commit,
        )
    url = f"{api.endpoint}/{repo}"
    return Pushed(url, commit.oid, commit.oid != found.commit, removed)


def _stale(found: Repository, publication: Publication) -> tuple[str, ...]:
    """What an earlier push left that is no part of this one, and foreign weights that would be loaded in its place."""
    listed = (found.marker or {}).get("files")
    before = set(listed) if isinstance(listed, list) else set()
    return tuple(
        name
        for name in found.content
        if name not in publication.files
        and (name in before or ("/" not in name and any(fnmatch(name, pattern) for pattern in _WEIGHTS)))
    )


def check_push(section: Push, run: RunFolder) -> None:
    """Refuse a recipe's `push:` before anything is loaded, when the push at the end of training would be refused.

    Raises:
        RunError: as `push` raises it.
    """
    if section.repo is None:
        return
    check_name(section.repo, "push.repo")
    api = client(section.repo)
    found = look(api, section.repo)
    refuse_without_rights(find_account(api, section.repo), section.repo)
    identity = run_identity(run) if run.provenance.is_file() and run.recipe.is_file() else None
    with _in_words_of_a_recipe():
        check_free(found, identity, "merged" if section.merged else "adapter", section.private, update=False)


@contextmanager
def _in_words_of_a_recipe() -> Iterator[None]:
    try:
        yield
    except RunError as error:
        words = str(error).replace("ask for a public one", "write push.private: false")
        words = re.sub(
            r" Give another name, or write over it with --update.*",
            " Give push.repo another name, or remove it and use `tune push RUN OWNER/NAME --update` afterwards.",
            words,
        )
        raise RunError(f"push.repo: {words}") from error


def push_at_end(
    section: Push,
    run: RunFolder,
    say: Callable[[str], None] = lambda line: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Pushed | None:
    """Publish a finished run as its recipe's `push:` says; None when it says nothing.

    Raises:
        RunError: it was refused or cut off. The run is finished, and the message says how to publish it.
    """
    if section.repo is None:
        return None
    try:
        with quiet_uploads():
            return push(run.root, section.repo, merged=section.merged, private=section.private, say=say, warn=warn)
    except RunError as error:
        raise RunError(f"{error} The run is finished. To publish it: {push_command(section, run)}") from error


def push_command(section: Push, run: RunFolder) -> str:
    """The command that does what a recipe's `push:` says."""
    options = [*(["--merged"] if section.merged else []), *(["--private"] if section.private else [])]
    return shlex.join(["tune", "push", str(run.root), str(section.repo), *options])


@contextmanager
def quiet_uploads() -> Iterator[None]:
    """Keep huggingface_hub's own progress bars off the console."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
