"""The names of torch that are not part of its documented interface, all of them, and what happens where one is missing.

Each function here does without the name it asks for: something then takes the plain, slower way.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_peek_interpreter = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)
_graph_task = getattr(torch._C, "_current_graph_task_id", lambda: -1)
#: whether autocast is on for some kind of device; taken to be so
any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, which an autograd function would have to serve, or
    `torch.jit.trace`, which takes whatever a shape decides as decided for all shapes."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _peek_interpreter() is not None or torch.jit.is_tracing()


def is_fake(tensor: object) -> bool:
    """Whether this stands for a plain tensor or parameter and has no values, as where memory is estimated."""
    return type(tensor).__name__ == "FakeTensor"


def backward_pass() -> int:
    """A number for the backward pass that this code runs in; -1 outside of one (and where torch does not say)."""
    return -1 if torch.compiler.is_compiling() else _graph_task()


@lru_cache(maxsize=16)
def has_half_instructions(dtype: torch.dtype) -> bool:
    """Whether the processor multiplies matrices of a half precision by instructions of its own; taken to be so."""
    probe = f"_is_mkldnn_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_supported"
    ask = getattr(torch.ops.mkldnn, probe, None)
    return ask is None or ask()


def kept_product(x: Tensor) -> tuple[Tensor, ...]:
    """Tensors of which x is the product, if autograd keeps all of them for its gradient anyway; else x itself.

    The first has the shape of x; others may have one number per row, [..., 1], or per column, [width]. So the inputs of
    projections behind a gate, and behind a norm, need no memory of their own.
    """
    if type(x.grad_fn).__name__ != "MulBackward0":
        return (x,)
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = None if top_hooks is None else top_hooks(True)
    if top_hooks is None or (hooks is not None and hooks[0].__module__ in _DEFERRED):
        return (x,)  # what is kept is recomputed or elsewhere, and must not be asked for now
    try:
        factors = tuple(sorted(_factors(x.grad_fn), key=Tensor.numel, reverse=True))
    except RuntimeError:  # a backward pass has freed them already, or something has written to them
        return (x,)
    # Those who share a model out among processes put parameters away between its modules' passes.
    shared_out = torch.distributed.is_available() and torch.distributed.is_initialized()
    fits = (
        factor.dtype == x.dtype
        and (factor.grad_fn is not None or not shared_out)
        and (factor.dim() == 1 or factor.shape[:-1] == x.shape[:-1])
        and factor.shape[-1:] in (x.shape[-1:], (1,))
        for factor in factors
    )
    return factors if factors and factors[0].shape == x.shape and x.dim() > 1 and all(fits) else (x,)


def _factors(node: Any) -> tuple[Tensor, ...]:
    """What a product is made of, and the product inside it if that is one; none where something is not kept."""
    left, right = getattr(node, "_saved_self", None), getattr(node, "_saved_other", None)
    if left is not None and right is not None:
        return left, right
    outer, inner = (left, node.next_functions[1][0]) if right is None else (right, node.next_functions[0][0])
    if outer is None or type(inner).__name__ != "MulBackward0":
        return ()
    within = _factors(inner)
    return (*within, outer) if within else ()


def fsdp_modules() -> list[Any]:
    """The modules of this process that `fully_shard` was called with; none where torch does not say."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    states = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", {})
    return [] if kind is None else [module for module in list(states) if isinstance(module, kind)]


def is_put_away(module: Any, parameter: Any) -> bool:
    """Whether `fully_shard` was called with this module and has its parameter put away at present; no if unknown."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    return any(held.sharded_param is parameter for held in _parameters_of(state))


def sharded_of(parameter: Any) -> Any:
    """The shards of a parameter that `fully_shard` has gathered for a forward pass; None if it has none."""
    for module in fsdp_modules():
        for held in _parameters_of(module._get_fsdp_state()):
            if getattr(held, "_unsharded_param", None) is parameter:
                return held.sharded_param
    return None


def window_of(view: Any) -> tuple[Tensor, slice] | None:
    """What FSDP1 keeps of a parameter that is a view of its flat one in a forward pass: this process's part, flat, and
    where that lies in the whole. None for other tensors."""
    flat: Any = getattr(view, "_base", None)
    for info, held in zip(getattr(flat, "_param_infos", ()), getattr(flat, "_shard_param_infos", ()), strict=True):
        if getattr(info.module, info.param_name, None) is view:
            if not held.in_shard or flat._local_shard.data_ptr() == flat.data_ptr():  # nothing is shared out
                return flat.new_empty(0), slice(0)
            kept = flat._local_shard.detach()[held.offset_in_shard :][: held.numel_in_shard]
            return kept, slice(held.intra_param_start_idx, held.intra_param_end_idx + 1)
    return None


def _parameters_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [held for group in groups if group is not None for held in group.fsdp_params]


_DEFERRED = ("torch.utils.checkpoint", "torch.autograd.graph")
