"""The files of a saved adapter: `adapter_config.json` and its weights, written together and read together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from peft.checkpoint.gather import unaliased
from peft.config import CONFIG_NAME, dump_config, read_config_file
from peft.errors import NoAdapterError
from peft.folder import check_folder, read_at_rest, replace_files
from peft.hub import CARD_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, fetch, pinned, split_hub_arguments
from peft.pickles import WeightsFileError, read_pickle


def infer_device() -> str:
    """The kind of accelerator that this machine has ("cuda", "mps", "xpu", ...), or "cpu"."""
    if hasattr(torch, "accelerator"):  # torch 2.6 and later
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found.type if found else "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"


def write_adapter(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    *,
    card: str | None = None,
    safe_serialization: bool = True,
    more: Mapping[str, bytes] | None = None,
) -> None:
    """Saves one adapter: configuration, weights and model card replace what is there all at once, or not at all.

    A process that is killed on the way leaves the old adapter or the new one. Weights of the other file format that
    lie in the folder are those of an older save and go.

    Args:
        folder: made if need be; other files in it are left alone.
        config: content of `adapter_config.json`.
        tensors: weights by the name they have in the file. Tensors that share memory are written in full each.
        card: text of `README.md`; None leaves it as it is.
        safe_serialization: write `adapter_model.safetensors`; False writes `adapter_model.bin`, a pickle.
        more: further files, by name.

    Raises:
        ValueError: `folder` is a file, or a tensor has no values (it is on the meta device).
        TypeError: something in `tensors` is not a tensor.
        OSError: the files could not be written (a full disk); what was there before is still whole.
    """
    check_folder(folder)
    stored = _storable(tensors, whole_storage=not safe_serialization)

    def write_safetensors(path: str) -> None:
        try:
            save_file(stored, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{os.fspath(folder)!r}: the weights could not be written ({error}).") from error

    def write_pickle(path: str) -> None:
        try:
            with open(path, "wb") as file:
                torch.save(stored, file)
        except RuntimeError as error:  # what torch makes of a full disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    both = (SAFETENSORS_WEIGHTS_NAME, write_safetensors), (WEIGHTS_NAME, write_pickle)
    (name, write), (other, _) = both if safe_serialization else both[::-1]
    files: dict[str, bytes | Callable[[str], object]] = dict(more or {})
    files |= {CONFIG_NAME: dump_config(config).encode(), name: write}
    if card is not None:
        files[CARD_NAME] = card.encode()
    replace_files(folder, files, drop=[other])


def _storable(tensors: Mapping[str, torch.Tensor], whole_storage: bool) -> dict[str, torch.Tensor]:
    """The tensors, contiguous, each with memory of its own (`whole_storage`: and of no more than itself)."""
    wrong = [name for name, value in tensors.items() if not isinstance(value, torch.Tensor)]
    if wrong:
        raise TypeError(f"Only tensors can be saved as weights; {wrong[0]!r} is a {type(tensors[wrong[0]]).__name__}.")
    empty = [name for name, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} tensor(s) are on the meta device and have no values to save, such as {empty[0]!r}."
            " Load or initialise the adapter before saving it."
        )
    stored = unaliased({name: tensor.detach() for name, tensor in tensors.items()})
    for name, tensor in stored.items():
        larger = whole_storage and tensor.untyped_storage().nbytes() > tensor.nbytes
        stored[name] = tensor.clone(memory_format=torch.contiguous_format) if larger else tensor.contiguous()
    return stored


def read_adapter(
    source: str | os.PathLike,
    subfolder: str | None = None,
    *,
    device: str | int | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hub: Any,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Content of `adapter_config.json` and the weights, both of the same save.

    That holds while other processes write to the folder or push to the repository. `load_peft_weights` describes the
    arguments.

    Raises:
        ValueError: configuration or weights are missing.
    """
    safe = hub.pop("use_safetensors", None)
    hub, unknown = split_hub_arguments(hub)
    _refuse(unknown, "read_adapter")

    def read() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        config = read_config_file(source, subfolder, **hub)
        weights = load_peft_weights(source, device, key_mapping, subfolder=subfolder, use_safetensors=safe, **hub)
        return config, weights

    if os.path.isdir(source):
        return read_at_rest(os.path.join(source, subfolder or ""), CONFIG_NAME, read)
    read_config_file(source, subfolder, **hub)  # now it is in the cache, as a file of one commit
    cached = {**hub, "local_files_only": True, "force_download": False}
    hub = pinned(fetch(source, CONFIG_NAME, subfolder=subfolder, **cached) or "", hub)
    return read()


def _refuse(unknown: Mapping[str, Any], function: str) -> None:
    if unknown:
        raise TypeError(f"{function}() does not know {', '.join(map(repr, unknown))}.")


def opened_weights(source: str | os.PathLike) -> dict[str, Any]:
    """Name of a tensor -> the opened .safetensors file that has it, of one file or of all in a folder."""
    paths = sorted(Path(source).glob("*.safetensors")) if os.path.isdir(source) else [source]
    files = [safe_open(path, "pt") for path in paths]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def load_peft_weights(
    model_id: str | os.PathLike,
    device: str | int | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, torch.Tensor]:
    """The weights of a saved adapter, by the names they have in the file.

    Args:
        model_id: a folder, or a repository id on the hub.
        device: where the tensors go; None takes the accelerator if there is one.
        key_mapping: regular expressions and what to put in place of their matches, applied to each name without the
            `base_model.model.` it begins with; for each name, the first expression that matches counts.
        hf_hub_download_kwargs: `subfolder` says where in the folder or repository the adapter lies; `revision`,
            `token`, `cache_dir`, `local_files_only` and `force_download` go to the hub. With `use_safetensors=True` no
            pickle (`.bin`) is read, with False nothing else; by default one is where there is no safetensors file, and
            torch is 2.6 or later. Whatever else than tensors a pickle holds is refused.

    Raises:
        ValueError: there are no weights, or they are damaged, or `key_mapping` fits the names badly.
        LocalEntryNotFoundError: the hub cannot be reached and its cache has no weights.
    """
    subfolder = hf_hub_download_kwargs.pop("subfolder", None)
    safe = hf_hub_download_kwargs.pop("use_safetensors", None)
    hub, unknown = split_hub_arguments(hf_hub_download_kwargs)
    _refuse(unknown, "load_peft_weights")
    target = torch.device(infer_device() if device is None else device)

    def read() -> dict[str, torch.Tensor]:
        path = _weights_path(model_id, subfolder, hub, safe)
        if path.endswith(".safetensors"):
            return load_safetensors(path, target)
        return read_pickle(path, target, asked=safe is False)

    tensors = read_at_rest(os.path.join(model_id, subfolder or ""), CONFIG_NAME, read)
    return renamed(tensors, key_mapping) if key_mapping else tensors


def _weights_path(source: str | os.PathLike, subfolder: str | None, hub: dict[str, Any], safe: bool | None) -> str:
    """Path of the weights, safetensors before pickle; only the one or the other where `safe` says so."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    reason: Exception | None = None
    wanted = {None: (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME), True: (SAFETENSORS_WEIGHTS_NAME,)}
    names = wanted.get(safe, (WEIGHTS_NAME,))
    for name in names:
        try:
            path = fetch(source, name, subfolder=subfolder, **hub)
        except LocalEntryNotFoundError as error:  # offline: the other format may be in the cache
            reason = error
            continue
        if path is not None:
            return path
    where = f"{os.fspath(source)!r}" + (f", subfolder {subfolder!r}" if subfolder else "")
    missing = f"Can't find the weights of an adapter at {where}: no {' and no '.join(names)}"
    if reason is not None:
        raise LocalEntryNotFoundError(f"{missing} in the cache, and the hub was not reached. {reason}") from reason
    raise NoAdapterError(f"{missing} in that " + ("folder." if os.path.isdir(source) else "repository of the hub."))


def load_safetensors(path: str, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, on a device.

    Raises:
        WeightsFileError: it is damaged, or none.
    """
    # What safetensors cannot fill directly takes the way over the memory of the host
    direct = device.type not in ("cpu", "mps", "meta")
    try:
        tensors = load_file(path, device=str(device) if direct else "cpu")
    except (FileNotFoundError, torch.OutOfMemoryError):  # replaced at this moment: the caller reads again
        raise
    except Exception as error:  # safetensors has a class of its own, and Python's for what it does not foresee
        if not os.path.exists(path):
            raise FileNotFoundError(path) from error
        raise WeightsFileError(f"{path} is damaged or not a safetensors file: {error}") from error
    return tensors if direct or device.type == "cpu" else {key: value.to(device) for key, value in tensors.items()}


def renamed(tensors: dict[str, torch.Tensor], key_mapping: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Tensors by other names, see `load_peft_weights`."""
    new: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in ("base_model.model.", "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"key_mapping is for names that begin with 'base_model.'; the file has {key!r}.")
        name = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        if prefix + name in new:
            raise ValueError(f"key_mapping gives two tensors the name {prefix + name!r}.")
        new[prefix + name] = tensor
    return new
