"""`peft inspect`: what a saved adapter holds, read from its files alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from peft import PeftConfig, load_peft_weights
from peft.cli.options import Inspect
from peft.cli.plots import layers
from peft.ops.merging import svd_of_product
from peft.registry import METHODS

#: the fields that say how large an adapter is, by the names that the methods give them
RANKS = ("r", "rank", "num_virtual_tokens")
#: in place of a module's name: for what all adapted modules share, and for a soft prompt
SHARED, PROMPT = "(shared)", "(prompt)"
#: columns of the table beyond which it lists modules one by one
COLUMNS = 7
Found = dict[str, Any]


def run(options: Inspect, *_: Any) -> int:
    found, name = examine(options.adapter), Path(options.adapter).resolve().name
    adapted = [module for module in found["modules"] if not module["full"]]
    key, label = "norm", "norm of the adapter's tensors"
    if adapted and all(module["update_norm"] is not None for module in adapted):
        key, label = "update_norm", "norm of the update, scaling · B A"
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found, key, label)
    png = options.png or (None if options.json else f"{name}-norms.png")
    if png:
        drawn = layers(found["modules"], key, f"{name}: {found['method']}", label, png)
        if not options.json:
            print(f"Picture: {png}" if drawn else "No picture: matplotlib is not installed (pip install 'peft[cli]')")
    return 0


def examine(adapter: str) -> Found:
    """Everything that the files of an adapter say without its base model, as JSON can hold it.

    Args:
        adapter: a folder or a hub id.

    Returns:
        `method`, `base_model`, `task_type`, `rank` (or None), `target_modules`, `parameters`, `bytes`, `dtypes`,
        `config`, and `modules`: of each its `name`, `layer` (index or None), `kind` (its name without the layer),
        `full` (stored whole, not as an adapter), `parameters`, `norm` (Frobenius, of all its tensors together),
        `update_norm` and `singular_values` (of LoRA's scaling * B A, else None), `rank_90` (how many of them have 90 %
        of its energy), and `tensors`: `name`, `shape`, `dtype`, `norm`.

    Raises:
        ValueError: there is no adapter.
    """
    read = PeftConfig.from_pretrained(adapter)
    config, weights = json.loads(json.dumps(read.to_json_dict(), default=str)), load_peft_weights(adapter, "cpu")
    method = config["peft_type"]
    if not method:
        raise ValueError(f"adapter_config.json of {adapter!r} names no method (peft_type)")
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        module, name = _split(key, method)
        modules.setdefault(module, {})[name] = tensor
    kinds = _short(list(modules))
    rows = []
    for name, tensors in modules.items():
        index = re.search(r"(?<=\.)\d+(?=\.)", name)
        spectrum = _spectrum(name, tensors, config) if method == "LORA" else None
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
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "rank": next((config[field] for field in RANKS if config.get(field)), None),
        "target_modules": config.get("target_modules"),
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
    """The last parts of each name without the layer's index, as many as it takes to tell it from the others."""
    words = {name: tuple(re.sub(r"\.\d+(?=\.)", "", name, count=1).split(".")) for name in names}
    kinds = set(words.values())

    def short(own: tuple[str, ...]) -> str:
        lengths = range(1, len(own) + 1)
        return ".".join(own[-next((n for n in lengths if sum(k[-n:] == own[-n:] for k in kinds) == 1), len(own)) :])

    return {name: short(own) for name, own in words.items()}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _norm(tensors: Iterable[torch.Tensor]) -> float | None:
    """The Frobenius norm of several tensors together; None where none of them holds numbers with a fraction."""
    parts = [tensor.double().norm() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(parts).norm().item() if parts else None


def _spectrum(name: str, tensors: Mapping[str, torch.Tensor], config: Found) -> torch.Tensor | None:
    """The singular values of scaling * B A, without making that product."""
    found = {part.removesuffix(".weight")[-2:]: tensor for part, tensor in tensors.items()}
    if set(found) != {"_A", "_B"}:
        return None
    a, b = found["_A"].double().flatten(1), found["_B"].double().flatten(1)

    def of_module(pattern: str, default: float) -> float:
        chosen = (v for k, v in (config.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({k})", name))
        return next(chosen, default)

    rank = of_module("rank_pattern", config["r"])
    if a.shape[0] != rank or b.shape[1] != rank:
        return None  # the experts of a fused parameter, the groups of a convolution
    scaling = of_module("alpha_pattern", config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    wide = rank > min(a.shape[1], b.shape[0])
    return abs(scaling) * (torch.linalg.svdvals(b @ a) if wide else svd_of_product(b, a)[1])


def _show(found: Found, key: str, label: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    targets, config = found["target_modules"], found["config"]
    alpha = f" (lora_alpha {config['lora_alpha']})" if config.get("lora_alpha") is not None else ""
    for name, value in {
        "method": found["method"],
        "base model": found["base_model"],
        "task": found["task_type"],
        "rank" if "num_virtual_tokens" not in config else "virtual tokens": found["rank"] and f"{found['rank']}{alpha}",
        "targets": ", ".join(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, list) else targets,
        "trained in full": ", ".join(module["name"] for module in found["modules"] if module["full"]),
        "modules": str(sum(module["name"] not in (SHARED, PROMPT) for module in found["modules"])),
        "parameters": f"{found['parameters']:,}",
        "size": f"{found['bytes'] / 1000:,.1f} kB of {', '.join(found['dtypes'])}",
    }.items():
        if value:
            facts.add_row(f"[bold]{name}", value)
    console.print(facts)
    console.print(f"\n[bold]{label}")
    layered = [module for module in found["modules"] if module["layer"] is not None and not module["full"]]
    kinds = list(dict.fromkeys(module["kind"] for module in layered))
    if 0 < len(kinds) <= COLUMNS:
        cells = {(module["layer"], module["kind"]): module[key] for module in layered}
        rows = []
        for layer in sorted({module["layer"] for module in layered}):
            count = sum(module["parameters"] for module in layered if module["layer"] == layer)
            rows.append([str(layer), *(_number(cells.get((layer, kind))) for kind in kinds), f"{count:,}"])
        console.print(_table(["layer", *kinds, "params"], rows))
    else:
        layered = []
    rows = [[m["name"], _number(m["norm"] if m[key] is None else m[key]), f"{m['parameters']:,}"]
            for m in found["modules"] if m not in layered]  # fmt: skip
    enough = [module["rank_90"] for module in found["modules"] if module["rank_90"]]
    if enough:
        console.print(f"90 % of a change are in rank {min(enough)} to {max(enough)} (see `peft resize`)")
    if rows:
        console.print(_table(["module", "norm", "params"], rows))


def _table(names: list[str], rows: list[list[str]]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    for name in names:
        first = name == names[0]
        table.add_column(name, justify="left" if first else "right", overflow="fold", min_width=None if first else 6)
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
