"""LoRA as mlx-lm has it: a folder with `adapters.safetensors` and an `adapter_config.json` of its own.

The tensors are `model.layers.0.self_attn.q_proj.lora_a` [in, r] and `.lora_b` [r, out] (DoRA: `.m` [out]), all of one
rank and one scale; `lora_parameters` says which modules of a layer have them, `num_layers` how many, from the last.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from peft.checkpoint.files import load_safetensors
from peft.folder import replace_files
from peft.lora_tools.formats import config_of_modules, scaled_factors
from peft.untrusted import read_json

FILE, CONFIG = "adapters.safetensors", "adapter_config.json"
_LEAVES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}


def is_mlx(folder: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter of mlx-lm."""
    return os.path.isfile(os.path.join(folder, FILE))


def write_mlx(folder: str | os.PathLike, config: Any, tensors: Mapping[str, Tensor], layers: int) -> None:
    """Writes a LoRA as mlx-lm reads it.

    Args:
        folder: where the two files go; replaced together, if they are there.
        config: of the adapter.
        tensors: by the names that this library's files have for them.
        layers: how many layers the base model has.

    Raises:
        ValueError: the adapter holds what mlx-lm has no place for.
    """
    alpha, factors = scaled_factors(config, tensors, "mlx")
    rank = max(leaves["A"].shape[0] for leaves in factors.values())
    out: dict[str, Tensor] = {}
    keys, first = set(), layers
    for name, leaves in factors.items():
        a, b, rest = leaves["A"], leaves["B"], rank - leaves["A"].shape[0]
        if rest:  # a smaller rank is filled up with zeros; its scale is alpha by that rank
            b = nn.functional.pad(b * (rank / a.shape[0]), (0, rest))
            a = nn.functional.pad(a, (0, 0, 0, rest))
        out[f"{name}.lora_a"], out[f"{name}.lora_b"] = a.T.contiguous(), b.T.contiguous()
        if "M" in leaves:
            out[f"{name}.m"] = leaves["M"]
        place = re.search(r"\.layers\.(\d+)\.(.+)$", name)
        keys.add(place[2] if place else name)
        first = min(first, int(place[1])) if place else first
    content = {
        "fine_tune_type": "dora" if config.use_dora else "lora",
        "model": config.base_model_name_or_path,
        "num_layers": layers - first,
        "lora_parameters": {
            "rank": rank, "scale": alpha / rank, "dropout": config.lora_dropout, "keys": sorted(keys)
        },
    }  # fmt: skip
    settings = json.dumps(content, indent=2).encode()
    replace_files(folder, {FILE: lambda place: save_file(out, place, {"format": "mlx"}), CONFIG: settings})


def read_mlx(folder: str | os.PathLike, embeddings: Iterable[str]) -> tuple[Any, dict[str, Tensor]]:
    """(configuration, tensors) of an adapter of mlx-lm.

    Args:
        folder: with its two files.
        embeddings: names of the base model's embeddings, of which the factors alone do not tell.

    Raises:
        ValueError: it was trained in full, or on experts, which mlx-lm holds in a way of its own.
    """
    path = os.path.join(folder, CONFIG)
    content = read_json(path)
    settings = content.get("lora_parameters")
    if not isinstance(settings, dict) or not isinstance(settings.get("scale"), (int, float)):
        raise ValueError(f"{path} has no lora_parameters with a scale: it is not mlx-lm's, or not of a LoRA.")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_safetensors(os.path.join(folder, FILE), torch.device("cpu")).items():
        name, _, leaf = key.rpartition(".")
        if leaf not in _LEAVES or tensor.dim() > 2:
            raise ValueError(f"{key!r} {list(tensor.shape)} is no part of a LoRA of a linear layer.")
        found.setdefault(name, {})[_LEAVES[leaf]] = tensor.T if tensor.dim() == 2 else tensor
    for leaves in found.values():
        leaves["alpha"] = torch.tensor(settings["scale"] * leaves["lora_A.weight"].shape[0])
    config, tensors = config_of_modules(found, path, embeddings=embeddings)
    config.base_model_name_or_path = content.get("model")
    config.lora_dropout = float(settings.get("dropout") or 0)
    return config, tensors
