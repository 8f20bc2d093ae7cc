"""`peft inspect`: what a saved adapter holds, read from its files alone."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peft import PeftConfig
from peft.checkpoint import read_adapter
from peft.cli.plots import norms
from peft.registry import METHODS
from peft.tuners.lora.layer import alpha_of, rank_of

#: the fields that say how large an adapter is, by the names that the methods give them
RANKS = ("r", "rank", "num_virtual_tokens")
#: in place of a module's name: for what all adapted modules share, and for a soft prompt
SHARED, PROMPT = "(shared)", "(prompt)"
#: columns of the table beyond which it lists modules one by one
COLUMNS = 7


def run(args: Namespace) -> int:
    found = examine(args.adapter)
    name = Path(args.adapter).resolve().name
    png = args.png or (None if args.json else f"{name}-norms.png")
    key, label = _measure(found)
    if png:
        rows = [(module["kind"], module["layer"], module[key]) for module in found["modules"]]
        norms([row for row in rows if row[2] is not None], f"{name}: {found['method']}", label, png)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found, key, label)
        print(f"Picture: {png}")
    return 0


def examine(adapter: str) -> dict[str, Any]:
    """Everything that the files of an adapter say without its base model, as JSON can hold it.

    Args:
        adapter: a folder or a hub id.

    Returns:
        `method`, `base_model`, `task_type`, `rank` (or None), `target_modules`, `parameters`, `bytes`, `dtypes`,
        `config`, and `modules`: of each its `name`, `layer` (index or None), `kind` (its name without the layer),
        `full` (stored whole, not as an adapter), `parameters`, `norm` (Frobenius, of all its tensors together),
        `update_norm` (of LoRA's scaling * B A, else None), and `tensors`: `name`, `shape`, `dtype`, `norm`.

    Raises:
        ValueError: there is no adapter.
    """
    config, weights = read_adapter(adapter, device="cpu")
    method = config["peft_type"]
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in weights.items():
        module, name = _split(key, method)
        modules.setdefault(module, {})[name] = tensor
    places = {name: _place(name) for name in modules}
    kinds = _short({pattern for pattern, _ in places.values()})
    return {
        "method": method,
        "base_model": config.get("base_model_name_or_path"),
        "task_type": config.get("task_type"),
        "rank": next((config[field] for field in RANKS if config.get(field)), None),
        "target_modules": config.get("target_modules"),
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in weights.values()),
        "dtypes": sorted({_dtype(tensor) for tensor in weights.values()}),
        "config": config,
        "modules": [
            {
                "name": name,
                "layer": places[name][1],
                "kind": kinds[places[name][0]],
                "full": all(part in ("weight", "bias", "base_layer.bias") for part in tensors),
                "parameters": sum(tensor.numel() for tensor in tensors.values()),
                "norm": _norm(tensors.values()),
                "update_norm": _update_norm(name, tensors, config) if method == "LORA" else None,
                "tensors": [
                    {"name": part, "shape": list(tensor.shape), "dtype": _dtype(tensor), "norm": _norm([tensor])}
                    for part, tensor in tensors.items()
                ],
            }
            for name, tensors in modules.items()
        ],
    }


def _split(key: str, method: str) -> tuple[str, str]:
    """A saved name as (module of the base model, tensor): a tensor of the adapter begins with the method's prefix."""
    inner = key.removeprefix("base_model.")
    if inner == key:
        return PROMPT, key
    prefix = METHODS[method].prefix if method in METHODS else f"{method.lower()}_"
    parts = inner.removeprefix("model.").split(".")
    for i, part in enumerate(parts):
        if part.startswith((prefix, "trainable_tokens_")):
            return ".".join(parts[:i]) or SHARED, ".".join(parts[i:])
    if len(parts) == 1:
        return SHARED, parts[0]
    if parts[-2] == "base_layer":  # a bias trained beside the adapter of its module
        return ".".join(parts[:-2]), ".".join(parts[-2:])
    return ".".join(parts[:-1]), parts[-1]


def _place(name: str) -> tuple[str, int | None]:
    """A module's name with a star for the index of its layer, and that index."""
    found = re.search(r"(?<=\.)\d+(?=\.)", name)
    return (f"{name[: found.start()]}*{name[found.end() :]}", int(found.group())) if found else (name, None)


def _short(patterns: set[str]) -> dict[str, str]:
    """The last parts of each name, as many as it takes to tell it from the others."""
    parts = {pattern: [part for part in pattern.split(".") if part != "*"] for pattern in patterns}
    short = {}
    for pattern, words in parts.items():
        for length in range(1, len(words) + 1):
            same = sum(other[-length:] == words[-length:] for other in parts.values())
            if same == 1:
                break
        short[pattern] = ".".join(words[-length:])
    return short


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _norm(tensors: Any) -> float | None:
    """The Frobenius norm of several tensors together; None where none of them holds numbers with a fraction."""
    parts = [tensor.double().norm() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(parts).norm().item() if parts else None


def _update_norm(name: str, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> float | None:
    """Frobenius norm of scaling * B A, without making that product: |BA|^2 is the sum of (B^T B) * (A A^T)."""
    for a_name, b_name in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
        if a_name in tensors and b_name in tensors and not any("magnitude" in part for part in tensors):
            a, b = tensors[a_name].double().flatten(1), tensors[b_name].double().flatten(1)
            lora = PeftConfig.from_peft_type(**config)
            rank = rank_of(lora, name)
            if a.shape[0] != rank or b.shape[1] != rank:
                return None  # the experts of a fused parameter, the groups of a convolution
            scaling = alpha_of(lora, name) / (rank**0.5 if lora.use_rslora else rank)
            return abs(scaling) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()
    return None


def _measure(found: Mapping[str, Any]) -> tuple[str, str]:
    """(key, words) of the norm that says most: of LoRA's update where every adapted module has it."""
    adapted = [module for module in found["modules"] if not module["full"]]
    if adapted and all(module["update_norm"] is not None for module in adapted):
        return "update_norm", "norm of the update, scaling · B A"
    return "norm", "norm of the adapter's tensors"


def _show(found: Mapping[str, Any], key: str, label: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    targets = found["target_modules"]
    full = [module["name"] for module in found["modules"] if module["full"]]
    rank = found["rank"] if found["rank"] is None else str(found["rank"])
    if found["config"].get("lora_alpha") is not None:
        rank = f"{rank} (lora_alpha {found['config']['lora_alpha']})"
    for name, value in {
        "method": found["method"],
        "base model": found["base_model"],
        "task": found["task_type"],
        "rank" if "num_virtual_tokens" not in found["config"] else "virtual tokens": rank,
        "targets": ", ".join(sorted({t.rpartition(".")[2] for t in targets})) if isinstance(targets, list) else targets,
        "trained in full": ", ".join(full),
        "modules": str(sum(module["name"] not in (SHARED, PROMPT) for module in found["modules"])),
        "parameters": f"{found['parameters']:,}",
        "size": f"{found['bytes'] / 1000:,.1f} kB of {', '.join(found['dtypes'])}",
    }.items():
        if value:
            facts.add_row(f"[bold]{name}", value)
    console.print(facts, highlight=False)

    in_layers = [module for module in found["modules"] if module["layer"] is not None and not module["full"]]
    kinds = list(dict.fromkeys(module["kind"] for module in in_layers))
    tables = []
    if 0 < len(kinds) <= COLUMNS:
        cells = {(module["layer"], module["kind"]): module[key] for module in in_layers}
        table = _table("layer", *kinds, "params")
        counts: Counter[int] = Counter()
        for module in in_layers:
            counts[module["layer"]] += module["parameters"]
        for layer in sorted(counts):
            table.add_row(str(layer), *(_number(cells.get((layer, kind))) for kind in kinds), f"{counts[layer]:,}")
        tables.append(table)
    else:
        in_layers = []
    others = [module for module in found["modules"] if module not in in_layers]
    if others:
        table = _table("module", "norm", "params")
        for module in others:
            norm = module["norm"] if module[key] is None else module[key]
            table.add_row(module["name"], _number(norm), f"{module['parameters']:,}")
        tables.append(table)
    console.print(f"\n[bold]{label}")
    for table in tables:
        console.print(table, highlight=False)


def _table(first: str, *others: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False)
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right", overflow="fold", min_width=6)
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
