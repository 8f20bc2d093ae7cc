"""`peft inspect`: what a saved adapter holds, read from its files alone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas
import torch

from peft import PeftConfig, load_peft_weights
from peft.cli.options import refuse
from peft.cli.plots import layers
from peft.integrations import serving
from peft.ops.merging import svd_of_product
from peft.registry import METHODS

#: the fields that say how large an adapter is, by the names that the methods give them
RANKS = ("r", "rank", "num_virtual_tokens")
#: in place of a module's name: for what all adapted modules share, and for a soft prompt
SHARED, PROMPT = "(shared)", "(prompt)"
Found = dict[str, Any]


def run(options: Any, *_: Any) -> None:
    found, name = examine(options.adapter), Path(options.adapter).resolve().name
    adapted = [module for module in found["modules"] if not module["full"]]
    key, label = "norm", "norm of the adapter's tensors"
    if adapted and all(module["update_norm"] is not None for module in adapted):
        key, label = "update_norm", "norm of the update, scaling · B A"
    if options.engine:
        names = [f"{module['name']}.{part['name']}" for module in found["modules"] for part in module["tensors"]]
        answers = map(str, serving.findings(options.engine, found["config"], names))
        found["served"] = [*serving.options(options.engine, found["config"]), *answers]
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found, key, label)
        if options.engine:
            print(f"\n{options.engine}", *found["served"], sep="\n  ")
    png = options.png or (None if options.json else f"{name}-norms.png")
    if png:
        layers(found["modules"], key, f"{name}: {found['method']}", label, png)


def examine(adapter: str) -> Found:
    """Everything that the files of an adapter say without its base model, as JSON can hold it.

    Args:
        adapter: a folder or a hub id.

    Returns:
        `method`, `rank` (or None), `parameters`, `bytes`, `dtypes`, `config`, and `modules`: of each its `name`,
        `layer` (index or None), `kind` (its name without the layer), `full` (stored whole, not as an adapter),
        `parameters`, `norm` (Frobenius, of all its tensors together), `update_norm` and `singular_values` (of LoRA's
        scaling * B A, else None), `rank_90` (how many of them have 90 % of its energy), and `tensors`: `name`, `shape`,
        `dtype`, `norm`.

    Raises:
        ValueError: there is no adapter.
    """
    read = PeftConfig.from_pretrained(adapter)
    config, weights = json.loads(json.dumps(read.to_json_dict(), default=str)), load_peft_weights(adapter, "cpu")
    method = config["peft_type"]
    refuse(not method, f"adapter_config.json of {adapter!r} names no method (peft_type)")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        module, name = _split(key, method)
        modules.setdefault(module, {})[name] = tensor
    kinds = _short(list(modules))
    rows = []
    for name, tensors in modules.items():
        index = re.search(r"(?<=\.)\d+(?=\.)", name)
        spectrum = _spectrum(name, tensors, read) if method == "LORA" else None
        energy = None if spectrum is None else spectrum.square().cumsum(0)
        rows.append({
            "name": name,
            "layer": int(index.group()) if index else None,
            "kind": kinds[name],
            "full": all(part in ("weight", "bias", "base_layer.bias") for part in tensors),
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "norm": _norm(tensors.values()),
            "update_norm": None if spectrum is None else spectrum.norm().item(),
            "singular_values": None if spectrum is None or not spectrum.any() else spectrum.tolist(),
            "rank_90": None if energy is None else int((energy < 0.9 * energy[-1]).sum()) + 1,
            "tensors": [{"name": part, "shape": list(tensor.shape), "dtype": _dtype(tensor), "norm": _norm([tensor])}
                        for part, tensor in tensors.items()],
        })  # fmt: skip
    return {
        "method": method,
        "rank": next((config[field] for field in RANKS if config.get(field)), None),
        "parameters": sum(row["parameters"] for row in rows),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        "dtypes": sorted({_dtype(tensor) for tensor in weights.values()}),
        "config": config,
        "modules": rows,
    }


def _split(key: str, method: str) -> tuple[str, str]:
    """A saved name as (module of the base model, tensor): a tensor of the adapter begins with the method's prefix."""
    inner = key.removeprefix("base_model.")
    if inner == key:
        return PROMPT, key
    prefix = METHODS[method].prefix if method in METHODS else f"{method.lower()}_"
    parts = inner.removeprefix("model.").split(".")
    own = (i for i, part in enumerate(parts) if part.startswith((prefix, "trainable_tokens_")))
    # a bias may be trained beside the adapter of its module
    at = next(own, len(parts) - 1 - (len(parts) > 1 and parts[-2] == "base_layer"))
    return ".".join(parts[:at]) or SHARED, ".".join(parts[at:])


def _short(names: Iterable[str]) -> dict[str, str]:
    """Names without the layer's index, and without what those in layers have in common before their last part."""
    words = {name: re.sub(r"\.\d+(?=\.)", "", name, count=1) for name in names}
    layered = [word.split(".")[:-1] for name, word in words.items() if word != name]
    alike = takewhile(lambda parts: len({*parts}) == 1, zip(*layered, strict=False))
    shared = "".join(f"{parts[0]}." for parts in alike)
    return {name: word.removeprefix(shared) for name, word in words.items()}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _norm(tensors: Iterable[torch.Tensor]) -> float | None:
    """The Frobenius norm of several tensors together; None where none of them holds numbers with a fraction."""
    parts = [tensor.double().norm() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(parts).norm().item() if parts else None


def _spectrum(name: str, tensors: Mapping[str, torch.Tensor], config: Any) -> torch.Tensor | None:
    """The singular values of scaling * B A, without making that product."""
    found = {part.removesuffix(".weight")[-2:]: tensor for part, tensor in tensors.items()}
    if set(found) != {"_A", "_B"}:
        return None
    a, b, own = found["_A"].double().flatten(1), found["_B"].double().flatten(1), config.at(name)
    if a.shape[0] != own.r or b.shape[1] != own.r:
        return None  # the experts of a fused parameter, the groups of a convolution
    scaling = own.lora_alpha / (own.r**0.5 if config.use_rslora else own.r)
    return abs(scaling) * svd_of_product(b, a)[1]


def _show(found: Found, key: str, label: str) -> None:
    frame, config = pandas.DataFrame(found["modules"]), found["config"]
    full, targets = frame.full.astype(bool), config.get("target_modules")
    alpha = f" (lora_alpha {config['lora_alpha']})" if config.get("lora_alpha") is not None else ""
    for name, value in {
        "method": found["method"],
        "base model": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
        "virtual tokens" if "num_virtual_tokens" in config else "rank": found["rank"] and f"{found['rank']}{alpha}",
        "targets": ", ".join(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, list) else targets,
        "trained in full": ", ".join(frame.name[full]),
        "modules": (~frame.name.isin([SHARED, PROMPT])).sum(),
        "parameters": f"{found['parameters']:,}",
        "size": f"{found['bytes'] / 1000:,.1f} kB of {', '.join(found['dtypes'])}",
    }.items():
        if value:
            print(f"{name:<16} {value}")
    ranks = frame.rank_90
    if ranks.notna().any():
        print(f"90 % of a change are in rank {ranks.min():.0f} to {ranks.max():.0f} (see `peft resize`)")
    form: Any = dict(float_format="{:.3g}".format, na_rep="", line_width=shutil.get_terminal_size().columns)
    layered = frame[frame.layer.notna() & ~full].astype({key: float, "layer": "Int64"})
    if len(layered):
        table = layered.pivot_table(key, "layer", "kind", sort=False)
        table["parameters"] = layered.groupby("layer").parameters.sum()
        print(f"\n{label}, by layer\n{table.rename_axis(index=None, columns=None).to_string(**form)}")
    if len(layered) < len(frame):
        print(f"\n{frame.drop(layered.index)[['name', 'norm', 'parameters']].to_string(index=False, **form)}")
