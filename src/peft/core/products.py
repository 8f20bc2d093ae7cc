"""Products that a method computes itself, in one with its linear base module's or on top of it, rather than calling it.

Only where nobody can tell the difference: the base module is frozen, plain, and without hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from peft.ops.lora import compute_dtype, lora_linear

if TYPE_CHECKING:
    from peft.core.layer import AdapterLayer


def frozen_linear(layer: AdapterLayer, below: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight [out, in] and bias of the base module in the dtype that a product with `x` is computed in.

    None where the module is more than that product, is trained, or is not `below`: then that has to be called.
    """
    base: Any = layer._modules["base_layer"]  # past `__getattr__`, which takes longer
    comes_first = below is base
    if not comes_first or not _is_frozen_dense(base):
        return None
    dtype, weight, bias = compute_dtype(x), layer.op.matrix(base.weight), base.bias
    if weight.dtype != dtype:
        if dtype == x.dtype:  # no autocast: the base itself says what it thinks of the mixture
            return None
        weight = weight.to(dtype)
    return weight, bias if bias is None else bias.to(dtype)


def run_low_rank(
    layer: AdapterLayer, a: Tensor, b: Tensor, p: float, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """The output of `below` plus (drop(x) A^T) B^T, in one with the base module's own product where that may be.

    Args:
        layer: the layer of the adapter.
        a: [r, in].
        b: [out, r].
        p: probability of dropout on the adapter's input.
        below: the module with what comes before this adapter; called with the rest.
    """
    frozen, dtype = frozen_linear(layer, below, x), compute_dtype(x)
    if frozen is None:
        return add_low_rank(layer, a, b, p, x, below(x, *args, **kwargs))
    return lora_linear(x.to(dtype), *frozen, None, a, b, 1.0, p)


def add_low_rank(layer: AdapterLayer, a: Tensor, b: Tensor, p: float, x: Tensor, result: Tensor) -> Tensor:
    """`result` [..., out] plus (drop(x) A^T) B^T; it may be written to."""
    dtype = compute_dtype(x)
    result = result.to(dtype)
    overwrite = result.is_contiguous() and not is_watched(layer.base_layer)
    return lora_linear(x.to(dtype), None, None, result, a, b, 1.0, p, overwrite=overwrite)


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where a module holds the hooks that see what goes in and out; they stay the same, so they may be kept."""
    own = module.__dict__
    return own["_forward_hooks"], own["_forward_pre_hooks"], own["_backward_hooks"], own["_backward_pre_hooks"]


def is_watched(module: nn.Module) -> bool:
    """Whether hooks on a module see what goes in and out, so that it has to be called."""
    return any(hooks_of(module))


def _is_frozen_dense(module: Any) -> bool:
    """Whether a base module is a linear layer that may be computed here rather than called."""
    if type(module) is not nn.Linear and type(module).__name__ != "Conv1D":
        return False
    if is_watched(module) or "forward" in module.__dict__ or module.weight.requires_grad:
        return False
    return type(module.weight) is nn.Parameter and (module.bias is None or not module.bias.requires_grad)
