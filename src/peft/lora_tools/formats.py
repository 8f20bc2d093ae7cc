"""LoRA files of other programs: those of kohya's scripts and of diffusers, in one file each, read and written.

- kohya: `lora_unet_down_blocks_0_proj.lora_down.weight` [r, in], `.lora_up.weight` [out, r] and `.alpha`, a number. The
  module's name has underscores for dots, so reading needs the names there are.
- diffusers: `unet.down_blocks.0.proj.lora_A.weight` and `.lora_B.weight`; older files have `.lora.down.weight` and
  `.lora.up.weight`. The model's part comes first; settings may stand in the file's metadata.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft.checkpoint.files import load_safetensors, opened_weights
from peft.config import build_config
from peft.core.targets import ROOT
from peft.folder import replace_files
from peft.integrations.serving import ENGINES, FEATURES, findings
from peft.tuners.lora.config import LoraConfig
from peft.untrusted import parse_json

FORMATS = ("kohya", "diffusers")
#: layouts -> what a name of theirs matches; no name matches two of them
_LAYOUTS = {
    "kohya": r"^lora_[a-z0-9]+_[^.]+\.(lora_\w+\.weight|alpha|dora_scale)$",
    "diffusers": r"^(?!base_model\.)\w+\..*\.(lora_[AB]\.\w+|lora\.(down|up)\.weight|alpha|lora_magnitude_vector)$",
    "a saved adapter, whose folder with adapter_config.json is to be named": r"^base_model\.",
    "mlx-lm, whose folder is to be named": r"\.(lora_[ab]|m)$",
}
_LEAVES = {
    "lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector",
    "lora.down.weight": "lora_A.weight", "lora.up.weight": "lora_B.weight", "alpha": "alpha",
    "lora_A.weight": "lora_A.weight", "lora_B.weight": "lora_B.weight", "lora_B.bias": "lora_B.bias",
    "lora_magnitude_vector": "lora_magnitude_vector",
}  # fmt: skip
_OF_KOHYA = {_LEAVES[name]: name for name in ("lora_down.weight", "lora_up.weight", "dora_scale")}
_OF_EMBEDDINGS = {"lora_A.weight": "lora_embedding_A", "lora_B.weight": "lora_embedding_B"}
#: kohya's names for the parts of a pipeline -> those of diffusers
PARTS = {"unet": "unet", "te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
_METADATA = "lora_adapter_metadata"


def module_names(folder: str | os.PathLike) -> list[str]:
    """The modules of a saved model that have weights, by the names of its tensors."""
    names = {key.rpartition(".")[0] for key in opened_weights(folder)}
    if not names:
        raise ValueError(f"{os.fspath(folder)!r} holds no .safetensors file whose names could be read.")
    return sorted(names)


def format_of(keys: Iterable[str]) -> str:
    """Which program wrote a file with these names; of all its names, for a guess would be worse than an error.

    Raises:
        ValueError: none that is known, or it cannot be told; names what was found.
    """
    keys = list(keys)
    found = {name: [key for key in keys if re.search(pattern, key)] for name, pattern in _LAYOUTS.items()}
    (name, most), *_ = sorted(found.items(), key=lambda item: -len(item[1]))
    words = f"no name is of a layout that is known here, as {keys[0]!r}" if not most else name
    if most and len(most) < len(keys):
        other = next(key for key in keys if key not in most)
        words = f"{other!r} is no part of a LoRA of {name}, as {len(most)} of {len(keys)} names are"
    if name not in FORMATS or len(most) < len(keys):
        raise ValueError(f"This is neither a file of kohya's scripts nor one of diffusers: {words}.")
    return name


def read_lora_file(
    path: str | os.PathLike, *, part: str | None = None, names: Iterable[str] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A LoRA from a file of another program.

    Args:
        path: a .safetensors file.
        part: the part of a pipeline whose LoRA is wanted (`unet`, `transformer`, `text_encoder`, ...); may be left out
            where the file is for one.
        names: the modules of the base model, for kohya's files.

    Returns:
        The configuration, and the tensors by the names that this library's files have for them.

    Raises:
        WeightsFileError: it is none.
        ValueError: the format is unknown, the part is missing or not the only one, a name is no module's, or a module
            has no whole LoRA.
    """
    tensors = load_safetensors(os.fspath(path), torch.device("cpu"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    found = _modules_of(tensors, names, format_of(tensors))
    if part is None and len(found) > 1:
        raise ValueError(f"{os.fspath(path)!r} holds LoRAs for {', '.join(sorted(found))}: say which part is wanted.")
    part = part or next(iter(found))
    if part not in found:
        raise ValueError(f"{os.fspath(path)!r} holds nothing for {part!r}; it has {', '.join(sorted(found))}.")
    modules = found[part]
    return config_of_modules(modules, path, _settings(metadata, part, os.fspath(path)))


Modules = dict[str, dict[str, dict[str, Tensor]]]


def _modules_of(tensors: Mapping[str, Tensor], names: Iterable[str] | None, format: str) -> Modules:
    """Part of a pipeline -> module -> its tensors, by the names that this library's files have for them."""
    is_kohya = format == "kohya"
    if is_kohya and names is None:
        raise ValueError("kohya's files have underscores for dots: the names of the base model's modules are needed.")
    dotted = {name.replace(".", "_"): name for name in names or ()}
    found: Modules = {}
    for key, value in tensors.items():
        leaf = next((old for old in sorted(_LEAVES, key=len, reverse=True) if key.endswith(f".{old}")), None)
        stem = key.removesuffix(f".{leaf}")
        part, _, name = stem.removeprefix("lora_").partition("_") if is_kohya else stem.partition(".")
        if leaf is None or not name:
            raise ValueError(f"{key!r} is no part of a LoRA that can be converted.")
        if is_kohya:
            if name not in dotted:
                raise ValueError(f"{key!r}: the base model has no module {name!r} (dots as underscores).")
            part, name = PARTS.get(part, part), dotted[name]
        if leaf == "dora_scale":  # [out, 1, ...] there; here [out], or [1, out, 1, ...] for convolutions
            value = value.flatten() if value.dim() < 3 else value.transpose(0, 1)
        found.setdefault(part, {}).setdefault(name, {})[_LEAVES[leaf]] = value
    return found


def _settings(metadata: Mapping[str, str], part: str, path: str) -> dict[str, Any]:
    """What a file's metadata says of the configuration of a part; empty if nothing."""
    prefix = f"{part}."
    known = parse_json(metadata.get(_METADATA, "{}").encode(), f"{_METADATA} in the header of {path}")
    fields = {key[len(prefix) :]: value for key, value in known.items() if key.startswith(prefix)}
    return {key: value for key, value in fields.items() if key in set(LoraConfig.__dataclass_fields__) - {"peft_type"}}


def config_of_modules(
    modules: Mapping[str, Mapping[str, Tensor]],
    path: str | os.PathLike,
    settings: Mapping[str, Any] | None = None,
    embeddings: Iterable[str] = (),
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """(configuration, tensors by the names that this library's files have for them) of modules with their factors.

    Args:
        modules: module -> `lora_A.weight` [r, in], `lora_B.weight` [out, r], perhaps `alpha`, and others of files.
        path: where they come from, for messages.
        settings: fields of the configuration, where they are known; else ranks and alphas are those of the modules.
        embeddings: those of the modules that are embeddings.

    Raises:
        ValueError: a module has no whole LoRA.
    """
    for name, leaves in modules.items():
        missing = {"lora_A.weight", "lora_B.weight"} - set(leaves)
        if missing:
            raise ValueError(f"{name!r} has no {' and no '.join(sorted(missing))}.")
    tensors = {
        f"{ROOT}{name}.{_OF_EMBEDDINGS.get(leaf, leaf) if name in embeddings else leaf}": value.contiguous()
        for name, leaves in modules.items()
        for leaf, value in leaves.items()
        if leaf != "alpha"
    }
    if "lora_alpha" in (settings or {}):
        return build_config({"peft_type": "LORA", **(settings or {})}, path), tensors
    held = {leaf for leaves in modules.values() for leaf in leaves}
    dora, bias = "lora_magnitude_vector" in held, "lora_B.bias" in held
    config = LoraConfig(target_modules=sorted(modules), use_dora=dora, lora_bias=bias)
    ranks = {name: leaves["lora_A.weight"].shape[0] for name, leaves in modules.items()}
    config.r, config.rank_pattern = as_pattern(ranks)
    alphas = {name: float(leaves.get("alpha", ranks[name])) for name, leaves in modules.items()}
    config.lora_alpha, config.alpha_pattern = as_pattern(alphas)
    return config, tensors


def as_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common of some numbers by module, and those that differ."""
    values = {key: int(value) if value == int(value) else value for key, value in values.items()}
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {key: value for key, value in values.items() if value != common}


def scaled_factors(
    config: Any, tensors: Mapping[str, Tensor], engine: str
) -> tuple[float, dict[str, dict[str, Tensor]]]:
    """(an alpha for all, module -> `A` [r, in], `B` [out, r], DoRA's `M` [out]) of a LoRA, for formats with one alpha.

    A change is alpha / r * B A with the r of its factors; where a module has another scale, its B makes up for it.

    Args:
        config: of the adapter.
        tensors: by the names that this library's files have for them.
        engine: the key of the program in the table of `integrations.serving`, which says what it has a place for.

    Raises:
        ValueError: the adapter holds what the program has no place for.
    """
    solved = {FEATURES[key].title for key in ("rslora", "rank_pattern", "alpha_pattern")} | {"the files"}
    for finding in findings(engine, config.to_json_dict(), tensors):
        if finding.feature not in solved:
            raise ValueError(f"For {ENGINES[engine].title}, {finding}.")
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.endswith(".base_layer.weight"):  # the base model's embeddings, saved along
            continue
        match = re.fullmatch(rf"{ROOT}(.+)\.(?:lora_(?:embedding_)?([AB])(?:\.weight)?|lora_magnitude_vector)", key)
        if match is None or value.dim() > 2:
            raise ValueError(f"{ENGINES[engine].title} has no place for {key!r} {list(value.shape)}.")
        found.setdefault(match[1], {})[match[2] or "M"] = value
    alphas = {}
    for name, leaves in found.items():
        r = leaves["A"].shape[0]
        alphas[name] = config.at(name).lora_alpha * (math.sqrt(r) if config.use_rslora else 1.0)
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    for name, leaves in found.items():
        if alphas[name] != alpha:
            leaves["B"] = leaves["B"] * (alphas[name] / alpha)
    return float(alpha), found


def write_lora_file(
    path: str | os.PathLike, config: LoraConfig, tensors: Mapping[str, Tensor], format: str, part: str = "unet"
) -> None:
    """Writes a LoRA as another program reads it, in one file.

    Args:
        path: the .safetensors file; replaced whole, if it is there.
        config: the configuration.
        tensors: by the names that this library's files have for them.
        format: `"kohya"` or `"diffusers"`.
        part: the part of a pipeline that the LoRA is for.

    Raises:
        ValueError: an unknown format, or the adapter holds what the format has no place for.
    """
    if format not in FORMATS:
        raise ValueError(f"Unknown format {format!r}; there are {', '.join(FORMATS)}.")
    if config.peft_type != "LORA":
        raise ValueError(f"{format} files hold LoRA, not {config.peft_type}; convert_to_lora makes one of it first.")
    short = {new: old for old, new in reversed(PARTS.items())}.get(part, part)
    out: dict[str, Tensor] = {}
    for key, value in tensors.items():
        leaf = next((new for new in _LEAVES.values() if key.endswith(f".{new}")), None)
        if leaf is None or (format == "kohya" and leaf not in _OF_KOHYA):
            raise ValueError(f"{format} files have no place for {key!r}.")
        name = key.removeprefix(ROOT).removesuffix(f".{leaf}")
        if format == "diffusers":
            out[f"{part}.{name}.{leaf}"] = value.contiguous()
            continue
        place = f"lora_{short}_{name.replace('.', '_')}"
        own = config.at(name)
        if leaf == "lora_magnitude_vector":
            value = value[:, None] if value.dim() == 1 else value.transpose(0, 1)
        out[f"{place}.{_OF_KOHYA[leaf]}"] = value.contiguous()
        out[f"{place}.alpha"] = torch.tensor(own.lora_alpha * (math.sqrt(own.r) if config.use_rslora else 1.0))
    metadata = {"format": "pt"}
    if format == "diffusers":
        settings = {f"{part}.{key}": value for key, value in config.to_json_dict().items()}
        metadata[_METADATA] = json.dumps(settings, sort_keys=True)
    folder, file = os.path.split(os.path.abspath(path))
    replace_files(folder, {file: lambda place: save_file(out, place, metadata)})
