"""Pickles that hold tensors by name and nothing else: whatever else is in one is refused, and no code of it runs."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from peft.errors import AdapterFileError


class WeightsFileError(AdapterFileError, SafetensorError, pickle.UnpicklingError):
    """A file of weights is damaged, or holds something else than tensors by name."""


def read_pickle(path: str, device: torch.device | str = "cpu", asked: bool = True) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name.

    Args:
        path: the file.
        device: where they go.
        asked: whether the caller has asked for a pickle; if not, none is read with a torch that may run its code.

    Raises:
        AdapterFileError: the file is damaged or holds something else, or is not read with this torch.
    """
    if not asked and not safe_pickles():
        raise AdapterFileError(
            f"{path} is a pickle, and with torch {torch.__version__} reading one may run code that it holds"
            " (CVE-2025-32434). Install torch 2.6 or later, or, if you trust it, pass use_safetensors=False."
        )
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:  # older than torch 1.6; out of memory, where a length that is wrong makes no room for so much
            content = torch.load(BytesIO(Path(path).read_bytes()), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0]
        raise WeightsFileError(f"{path} is damaged, or holds more than tensors, which is not read: {reason}") from error
    except Exception as error:  # torch lets through whatever comes up in it
        if not Path(path).exists():  # replaced at this moment: the caller reads again
            raise FileNotFoundError(path) from error
        raise WeightsFileError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict):
        raise WeightsFileError(f"{path} holds a {type(content).__name__}, not tensors by name.")
    return {name: _plain_tensor(path, name, value).to(device) for name, value in content.items()}


def safe_pickles() -> bool:
    """Whether this version of torch keeps its word that `weights_only` runs no code."""
    return tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) >= (2, 6)


def _check_archive(path: str) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which torch's files are not")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("it says that there is more in it than it has")


def _plain_tensor(path: str, name: Any, value: Any) -> torch.Tensor:
    if not isinstance(name, str):
        raise WeightsFileError(f"{path} has {name!r} for the name of a tensor.")
    if not isinstance(value, torch.Tensor):
        raise WeightsFileError(f"{path}: {name} is a {type(value).__name__}, not a tensor.")
    value = value.detach()
    if value.layout != torch.strided or value.is_quantized or type(value) is not torch.Tensor:
        raise WeightsFileError(f"{path}: {name} is a tensor of a kind ({value.layout}) that adapters do not have.")
    if value.nbytes > value.untyped_storage().nbytes():
        raise WeightsFileError(f"{path}: {name} has the shape {tuple(value.shape)}, and the file not as many values.")
    return value
