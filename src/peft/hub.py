"""One file from a folder or from the Hugging Face Hub, and a folder pushed to it."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft.errors import warn
from peft.folder import find
from peft.version import __version__

SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
CARD_NAME = "README.md"

#: keyword arguments of ``from_pretrained`` that speak to the hub rather than to the model
HUB_ARGUMENTS = (
    "revision", "token", "cache_dir", "local_dir", "local_files_only", "force_download", "repo_type", "etag_timeout",
    "endpoint", "headers", "user_agent", "library_name", "library_version",
)  # fmt: skip
#: those that huggingface_hub once had
_OBSOLETE = ("proxies", "resume_download", "local_dir_use_symlinks")


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts ``arguments`` into (those for the hub, the rest); ``use_auth_token`` is read as ``token``."""
    hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS}
    rest = {k: value for k, value in arguments.items() if k not in (*HUB_ARGUMENTS, *_OBSOLETE, "use_auth_token")}
    if arguments.get("use_auth_token") is not None:
        hub.setdefault("token", arguments["use_auth_token"])
    return hub, rest


def is_path(name: str) -> bool:
    """Whether a name is a path, there or not, and thus no id on the hub."""
    return os.path.exists(name) or name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1


def fetch(source: str | os.PathLike, filename: str, *, subfolder: str | None = None, **hub: Any) -> str | None:
    """Path of ``filename`` in ``source``: a local folder if there is one, else a hub repository.

    Returns None where the folder or repository has no such file. Trouble on the way (no network, no access, an
    unknown repository) raises what huggingface_hub raises.
    """
    if os.path.isdir(source):
        return find(os.path.join(source, subfolder) if subfolder else source, filename)

    if is_path(os.fspath(source)):
        raise NotADirectoryError("such a path is no id on the hub either")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hub = {"library_name": "peft", "library_version": __version__, **hub}
        return hf_hub_download(os.fspath(source), filename, subfolder=subfolder or None, **hub)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def pinned(path: str, hub: dict[str, Any]) -> dict[str, Any]:
    """``hub`` with the commit that ``path``, a file in the hub's cache, belongs to as ``revision``.

    What is fetched with it comes from that same commit, whatever is pushed meanwhile.
    """
    commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)
    return {**hub, "revision": commit[1]} if commit else hub


def push(
    write: Callable[[str], object],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> Any:
    """Lets ``write`` fill a temporary folder and sends what it wrote to a hub repository, as one commit.

    A model card that the repository has lies in the folder beforehand, to be updated rather than lost. Weights of the
    other file format are removed by the same commit: they would be those of an older adapter.

    Args:
        write: writes files into the folder whose path it is given.
        repo_id: made if need be.
        commit_message: first line of the commit.
        commit_description: the rest of its message.
        private: whether a repository that is made is private; None for the account's default.
        token: access token, or False for none; None takes the one that was stored on login.
        revision: branch, made if need be.
        create_pr: open a pull request instead of committing to the branch.
        tags: added to those of the model card.

    Returns:
        huggingface_hub's ``CommitInfo``.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=token, library_name="peft", library_version=__version__)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _write_beside_card(write, folder, fetch(repo, CARD_NAME, revision=revision, token=token), tags)
        files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
        stale = {other for name in files if (other := _other_format(name))}
        if stale:
            stale &= set(api.list_repo_files(repo, revision=None if create_pr else revision))
        changes: list[Any] = [CommitOperationDelete(name) for name in sorted(stale)]
        changes += [CommitOperationAdd(name, str(path)) for name, path in sorted(files.items())]
        # Not upload_folder, which may make several commits of one folder
        more: dict[str, Any] = {"commit_description": commit_description, "revision": revision, "create_pr": create_pr}
        return api.create_commit(repo, changes, commit_message=commit_message or "Upload adapter", **more)


def _write_beside_card(write: Callable[[str], object], folder: str, there: str | None, tags: list[str] | None) -> None:
    """Lets `write` fill a folder in which the model card `there` lies; that is left out if it is the same after."""
    card = Path(folder, CARD_NAME)
    before = Path(there).read_bytes() if there else None
    if before is not None:
        card.write_bytes(before)
    write(folder)
    if tags:
        _add_tags(card, tags)
    if before is not None and card.exists() and card.read_bytes() == before:
        card.unlink()


def _other_format(name: str) -> str | None:
    """Name that the file of weights ``name`` has in the other format; None if it is no file of weights."""
    folder, _, base = name.rpartition("/")
    other = {SAFETENSORS_WEIGHTS_NAME: WEIGHTS_NAME, WEIGHTS_NAME: SAFETENSORS_WEIGHTS_NAME}.get(base)
    return other and (f"{folder}/{other}" if folder else other)


def _add_tags(path: Path, tags: list[str]) -> None:
    from huggingface_hub import ModelCard

    try:
        card = ModelCard.load(path) if path.exists() else ModelCard("---\nlibrary_name: peft\n---\n")
        there = card.data.get("tags") or []
    except Exception as error:  # what a person or another program wrote
        warn(f"The tags {', '.join(tags)} are left out: the {CARD_NAME} cannot be read. {error}")
        return
    card.data["tags"] = list(dict.fromkeys([*([there] if isinstance(there, str) else there), *tags]))
    card.save(path)
