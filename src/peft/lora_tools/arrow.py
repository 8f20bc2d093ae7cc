"""Several LoRA adapters in one model, of which each token is routed to some (Arrow)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft.core.layer import AdapterLayer
from peft.model import PeftModel
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.settings import ArrowConfig
from peft.tuners.lora.variants.arrow import GENERAL_PREFIX, ROUTER, TASK_PREFIX


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model that routes each token to some of several LoRA adapters (arXiv:2405.11157).

    The adapters become `task_0`, `task_1`, ..., the general ones `gks_0`, ...; `arrow_router` chooses, and is active.

    Args:
        base_model: the model that the adapters were made for.
        task_specific_adapter_paths: folders or hub repositories of the experts; `owner/name/folder` is a folder in one.
        arrow_config: how to choose; the names of the adapters are filled in.
        general_adapter_paths: adapters whose mean is taken out of the experts, where `arrow_config.use_gks` says so.
        adapter_kwargs: for loading, as `PeftModel.from_pretrained` has them.

    Raises:
        ValueError: there are no experts, or no general adapters where they are needed, or the adapters differ in rank
            or in the modules they are on.
        TypeError: an adapter is on a module that is not linear.
    """
    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths must name at least one adapter.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks=True needs general_adapter_paths.")
    general = list(general_adapter_paths or ()) if arrow_config.use_gks else []
    paths = {f"{TASK_PREFIX}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    arrow_config.task_adapter_names = list(paths)
    arrow_config.gks_adapter_names = [f"{GENERAL_PREFIX}{i}" for i in range(len(general))]
    paths |= dict(zip(arrow_config.gks_adapter_names, general, strict=True))
    model: Any = base_model
    for name, path in paths.items():
        options = dict(adapter_kwargs)
        if not os.path.isdir(path) and path.count("/") > 1:
            owner, repository, folder = path.strip("/").split("/", 2)
            path = f"{owner}/{repository}"
            options.setdefault("subfolder", folder)
        if model is base_model:
            model = PeftModel.from_pretrained(base_model, path, adapter_name=name, **options)
        else:
            model.load_adapter(path, adapter_name=name, **options)
    r, targets = _common_shape(model, list(paths))
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=targets, r=r))
    model.set_adapter(ROUTER)
    return model


def _common_shape(model: PeftModel, names: Sequence[str]) -> tuple[int, list[str]]:
    """The rank of adapters and the modules they are on, which must be the same for all."""
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for key, module in model.base_model.model.named_modules():
        for name in names if isinstance(module, AdapterLayer) else ():
            if module.has(name):
                if not module.op.linear:
                    raise TypeError(f"Adapter {name!r} is on {key!r}, a {module.op.kind}; Arrow needs linear layers.")
                found[name][key] = module.r[name]
    first = found[names[0]]
    for name, ranks in found.items():
        if ranks != first or len(set(ranks.values())) != 1:
            raise ValueError(
                f"Adapters that Arrow chooses from need the same rank and the same modules: {names[0]!r} has rank"
                f" {sorted(set(first.values()))} on {len(first)} modules, {name!r} has rank"
                f" {sorted(set(ranks.values()))} on {len(ranks)}."
            )
    return next(iter(first.values())), list(first)
