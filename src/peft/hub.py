"""One file from a folder or from the Hugging Face Hub, and a folder pushed to it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

#: keyword arguments of ``from_pretrained`` that speak to the hub rather than to the model
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")


def split_hub_arguments(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parts ``arguments`` into (those for the hub, the rest); ``use_auth_token`` is read as ``token``."""
    hub = {key: value for key, value in arguments.items() if key in HUB_ARGUMENTS and key != "proxies"}
    rest = {key: value for key, value in arguments.items() if key not in (*HUB_ARGUMENTS, "use_auth_token")}
    if arguments.get("use_auth_token") is not None:
        hub.setdefault("token", arguments["use_auth_token"])
    return hub, rest


def fetch(source: str | os.PathLike, filename: str, *, subfolder: str | None = None, **hub: Any) -> str | None:
    """Path of ``filename`` in ``source``: a local folder if there is one, else a hub repository.

    Returns None where the folder or repository has no such file. Trouble on the way (no network, no access, an
    unknown repository) raises what huggingface_hub raises.
    """
    folder = os.path.join(source, subfolder) if subfolder else os.fspath(source)
    if os.path.isdir(source):
        path = os.path.join(folder, filename)
        return path if os.path.isfile(path) else None

    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hf_hub_download(os.fspath(source), filename, subfolder=subfolder or None, **hub)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def push(
    write: Callable[[str], object],
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_description: str | None = None,
) -> Any:
    """Lets ``write`` fill a temporary folder and commits it to ``repo_id``, which is created if need be.

    Returns huggingface_hub's ``CommitInfo``.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write(folder)
        return api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=commit_message or "Upload adapter",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
