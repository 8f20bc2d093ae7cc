"""Which modules FSDP1 makes a unit of."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from torch import Tensor, nn

from peft.core.layer import AdapterLayer
from peft.errors import warn
from peft.tuners.prompts.base import VirtualTokens


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """Which modules FSDP wraps: transformer blocks, soft prompts, and by itself each trainable leaf that it may.

    A leaf of its own because FSDP wants the parameters of a wrapped module all trainable or all frozen, unless it is
    given `use_orig_params=True`; with that, every method works. A leaf that is read rather than called stays in its
    block, and so does a block in the model whose adapters share tensors with others.

    Args:
        model: a `PeftModel`. The classes of its blocks are those that its parts list as `_no_split_modules`, or the
            names in the environment variable FSDP_TRANSFORMER_CLS_TO_WRAP, separated by commas.

    Returns:
        A policy as `torch.distributed.fsdp` takes it.

    Raises:
        TypeError: the model has no module of a class that is named.
    """
    names = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP")
    if names is not None:
        wanted = {name.strip() for name in names.split(",") if name.strip()}
    else:
        wanted = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    by_name = {type(module).__name__: type(module) for module in model.modules()}
    missing = sorted(wanted - by_name.keys())
    if names is not None and missing:
        raise TypeError(f"FSDP_TRANSFORMER_CLS_TO_WRAP names {', '.join(missing)}; the model has no such module.")
    blocks = tuple(by_name[name] for name in wanted if name in by_name)
    whole, read = _sharing_blocks(model, blocks), _read_modules(model)

    def wraps(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        if recurse or (isinstance(module, VirtualTokens) and id(module) not in read):
            return True
        if isinstance(module, blocks):
            return id(module) not in whole
        weight = getattr(module, "weight", None)
        is_trained = isinstance(weight, Tensor) and weight.requires_grad
        return is_trained and next(module.children(), None) is None and id(module) not in read

    return wraps


def _sharing_blocks(model: nn.Module, kinds: tuple[type, ...]) -> set[int]:
    """The blocks that train parameters which the model has elsewhere too: FSDP holds each in one place."""
    blocks, outside = [], []
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, kinds):
            blocks.append(module)
        else:
            outside += [id(parameter) for parameter in module._parameters.values()]
            waiting += [child for child in module._modules.values() if child is not None]
    places = Counter({*outside})
    trained = {id(block): {id(p) for p in block.parameters() if p.requires_grad} for block in blocks}
    for parameters in trained.values():
        places.update(parameters)
    shared = {id(block) for block in blocks if any(places[p] > 1 for p in trained[id(block)])}
    if shared:
        warn(
            f"{len(shared)} of {len(blocks)} blocks train tensors that other parts of the model hold as well, which"
            " FSDP keeps in one place: they become no units of their own, and are gathered with the rest of the model."
        )
    return shared


def _read_modules(model: nn.Module) -> set[int]:
    """Modules of adapters whose weights are read; FSDP brings those of a unit together when it is called."""
    read: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, VirtualTokens) and module.reads_weights:
            read.append(module)
        elif isinstance(module, AdapterLayer):
            slots = [slot for slot in module.slots if slot not in module.unit_slots and slot in module._modules]
            read += [module.get_submodule(slot) for slot in slots]
    return {id(module) for each in read for module in each.modules()}
