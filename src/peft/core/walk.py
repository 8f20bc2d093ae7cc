"""Walks through a model with adapters: its parts, and what of it is the base model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from peft.core.layer import AdapterLayer
from peft.core.part import Part
from peft.core.wrappers import TrainableTokensWrapper, hand_over_hooks, layer_of

L = TypeVar("L", bound=AdapterLayer)


def parts_of(model: nn.Module) -> list[tuple[str, Part]]:
    """All adapter layers and trained modules in a model by name, outer ones before what they wrap."""
    return [(name, module) for name, module in live_modules(model) if isinstance(module, Part)]


def layers_of(model: nn.Module, kind: type[L], adapter_name: str | None = None) -> dict[str, L]:
    """The layers of a kind that have an adapter, by name; all of that kind if None."""
    layers = ((path, part) for path, part in parts_of(model) if isinstance(part, kind))
    return {path: layer for path, layer in layers if adapter_name is None or layer.has(adapter_name)}


def live_modules(model: nn.Module, copies: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` without what adapters are made of; without `copies`, also without modules trained in full.

    So the walk takes as long with a hundred adapters as with none. What FSDP and others put around modules has no part
    in it, nor in the names.
    """
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        module = layer_of(module)
        if module in seen:
            continue
        seen.add(module)
        yield path, module
        children = module._modules
        if isinstance(module, AdapterLayer):
            children = {"base_layer": children["base_layer"]}
        elif not copies and (inner := getattr(type(module), "holds", "")):
            children = {inner: module._modules[inner]}
        if children:
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, child) for name, child in reversed(children.items()) if child is not None]


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the base model by name; those that several modules hold come several times."""
    for path, module in live_modules(model, copies=False):
        for name, parameter in module._parameters.items() if not isinstance(module, Part) else ():
            if parameter is not None:
                yield f"{path}.{name}", parameter


def put_back(model: nn.Module, key: str, module: nn.Module | None) -> None:
    """Puts `module` in place of the part called `key`, with the hooks that somebody has put on that."""
    parent, _, name = key.rpartition(".")
    owner: Any = layer_of(model.get_submodule(parent))
    if module is None:
        del owner._modules[name]
        return
    for holder in dict.fromkeys((layer_of(owner._modules[name]), owner._modules[name])):
        if isinstance(holder, (Part, TrainableTokensWrapper)):
            hand_over_hooks(holder, module)
    setattr(owner, name, module)


def live_key(model: nn.Module, key: str) -> str:
    """The name that the module `key` of the plain model has now, adapter layers on its way counted in."""
    module, path = model, []
    for name in key.split(".") if key else ():
        while isinstance(module, Part):
            path.append(getattr(type(module), "holds", "base_layer"))
            module = module.wrapped
        module = getattr(module, name)
        path.append(name)
    return ".".join(path)


def in_files(model: nn.Module, adapter_name: str, name: str) -> str:
    """The name that files of an adapter have for a tensor: as if it were alone, and the base model called `model`."""
    module: Any = model
    parts: list[str] = []
    for part in name.split(".") if "base_layer" in name or "original_module" in name else ():
        inward = part in ("base_layer", "original_module") and isinstance(module, Part)
        if inward and module.is_beside(adapter_name) and part == "base_layer":
            parts.append("token_adapter")
        if not inward or module.has(adapter_name):
            parts.append(part)
        module = layer_of(module._modules[part]) if module and module._modules.get(part) else None
    name = ".".join(parts) or name
    holder = getattr(model.__dict__.get("_modules", {}).get("base_model"), "holder", "model")
    return name if holder == "model" else name.replace(f"base_model.{holder}.", "base_model.model.", 1)


def with_progress(items: list[Any], show: bool, label: str) -> Any:
    """`items`, with a progress bar while they are walked through if `show`."""
    if not show:
        return items
    from tqdm.auto import tqdm

    return tqdm(items, desc=label)
