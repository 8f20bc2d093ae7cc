"""Names that other packages import from old paths and that nothing here needs; `compat` says where each was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peft.core.base_op import base_op
from peft.core.layer import AdapterLayer
from peft.core.storage import onloaded, storage_of
from peft.core.targets import ALL_LINEAR, named_targets


class ExcludedModule:
    """What `check_target_module_exists` once gave for modules in `exclude_modules`; it gives None now."""

    def __bool__(self) -> bool:
        return False


# ---- weights


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The transposed weight if `fan_in_fan_out`, else the weight itself; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


@contextmanager
def onload_layer(layer: nn.Module) -> Iterator[None]:
    """While it lasts, the weights of a layer, and of what is inside, that accelerate offloads are there."""
    with ExitStack() as stack:
        for module in layer.modules():
            stack.enter_context(onloaded(module))
        yield


# ---- adapters


def check_adapters_to_merge(module: AdapterLayer, adapter_names: Sequence[str] | str | None = None) -> list[str]:
    """Which adapters a merge of `adapter_names` (None: of the active ones) has to add; a warning for those that are."""
    return module.names_to_merge(adapter_names)


def maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """The configuration with the names of all linear layers, head aside, for "all-linear"; others as they are."""
    if getattr(peft_config, "target_modules", None) == ALL_LINEAR:
        peft_config.target_modules = named_targets(peft_config, model)
    return peft_config


# ---- methods of layers


def cast_input_dtype(layer: AdapterLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in the dtype of an adapter's weight, unless the layer is to leave it as it is."""
    return x.to(dtype) if layer.cast_input_dtype_enabled else x


def check_forward_args(layer: AdapterLayer, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Raises ValueError where `adapter_names` are not one for each sample, or adapters are merged."""
    names = kwargs.get("adapter_names")
    if names is not None and len(names) != len(x):
        raise ValueError(f"adapter_names has length {len(names)}, and there are {len(x)} samples; one each is needed.")
    if names is not None and layer.merged:
        raise ValueError("adapter_names cannot be used while adapters are merged; call unmerge_adapter() first.")


def mixed_batch_forward(layer: AdapterLayer, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Any:
    """The layer's output where each sample has an adapter of its own."""
    return layer(x, *args, adapter_names=adapter_names, **kwargs)


def move_adapter_to_base_layer(layer: AdapterLayer, adapter_name: str, device: torch.device | None = None) -> None:
    """Moves an adapter to the device of the base weight, or to `device`."""
    layer.move(adapter_name, layer.place()[0] if device is None else device)


@contextmanager
def activate_lora(layer: AdapterLayer, active_adapters: Sequence[str]) -> Iterator[None]:
    """While it lasts, the parameter of the base module is as these adapters make it."""
    names = [name for name in active_adapters if layer.has(name)]
    base, own = layer.get_base_layer(), layer.op.weight_name
    held = dict(base._parameters)
    if names:
        weight = layer.effective(names)[0]
        del base._parameters[own]
        base.__dict__[own] = weight
    try:
        yield
    finally:
        base.__dict__.pop(own, None)
        base._parameters.clear()
        base._parameters.update(held)


class Added(nn.Module):
    """W -> W + `delta_weight`, as a parametrisation of a parameter."""

    def __init__(self, delta_weight: Tensor):
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: Tensor) -> Tensor:
        return W + self.delta_weight


def measure_lengths(
    magnitude: Any, *, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, scaling: float, **kwargs: Any
) -> None:
    """Makes DoRA's magnitudes the lengths of the rows of W + scaling B A, for a linear layer."""
    op: Any = base_op(base_layer)
    with torch.no_grad(), onloaded(base_layer):
        weight = op.matrix(storage_of(base_layer, op.weight_name).read(base_layer, op.weight_name)).to(lora_A.dtype)
        lengths = torch.linalg.norm(weight + scaling * (lora_B @ lora_A), dim=1)
    magnitude.weight = nn.Parameter(lengths)
