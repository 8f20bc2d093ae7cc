"""Base module and changes -> output: how a layer runs with its adapters, alone and in mixed batches.

The one place that decides how: in one with a frozen linear layer, on top of it, or with a changed weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import costs
from peft.core.adapted import AdaptedModule
from peft.core.base_op import ParameterOp
from peft.core.call import calling
from peft.core.change import Add, Change, LowRank, OnInput, Statistics, bias_with
from peft.core.merge import changed
from peft.core.routing import Route, join_rows
from peft.core.stacks import kept_stack, new_stack
from peft.core.storage import is_plain, onloaded
from peft.core.storage.shared import run_with
from peft.core.tensor_parallel import layout_of
from peft.ops.factored import FactoredWeight, warn_of_no_dropout
from peft.ops.internals import is_fake
from peft.ops.lora import compute_dtype, lora_linear, needs_plain
from peft.ops.matrix import Product


def run(layer: AdaptedModule, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The module's output with these adapters, one on top of the other, the first next to the base module."""
    layout = layout_of(layer)
    if layout is not None:
        return layout.run(names, x, *args, **kwargs)
    changes = layer.changes(names)
    op = layer.op
    for change in changes:
        if op.own_forward or not change.acts(op):
            return _run_weight(layer, changes, x, *args, **kwargs)
    if len(changes) == 1:
        return _first(layer, changes[0], x, args, kwargs)
    if not changes:
        return layer.base_layer(x, *args, **kwargs)
    module = layer.get_base_layer()
    inputs = [x]
    for change in reversed(changes[1:]):
        inputs.append(change.enter(op, module, inputs[-1]))
    y, rest = _parts(_first(layer, changes[0], inputs.pop(), args, kwargs))
    for place, change in enumerate(changes[1:], 1):
        y = change.leave(op, module, inputs.pop(), y, _bias(layer, change, changes[:place]), y.is_contiguous())
    return y if rest is None else (y, *rest)


def _bias(layer: AdaptedModule, change: Change, before: Sequence[Change] = ()) -> Tensor | None:
    """The bias that is part of the output which a change acts on, where it has to know that."""
    if not change.needs_bias:
        return None
    return bias_with(before, layer.bias_below())


def _parts(output: Any) -> tuple[Tensor, tuple[Any, ...] | None]:
    """What changes act on, and what a module returns beside it (Megatron's layers: the bias)."""
    return (output[0], output[1:]) if isinstance(output, tuple) else (output, None)


def _first(layer: AdaptedModule, change: Change, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The base module with the change next to it, in one where that saves something and nobody can tell."""
    kind = type(change)
    if kind is LowRank or kind is Add or kind is OnInput:
        frozen = _frozen_linear(layer, x)
        if frozen is not None:
            y = _fused(layer, change, x, *frozen)
            if y is not None:
                return y
    op, module, base = layer.op, layer.get_base_layer(), layer._modules["base_layer"]
    y, rest = _parts(base(change.enter(op, module, x), *args, **kwargs))  # type: ignore[misc]
    y = change.leave(op, module, x, y, _bias(layer, change), y.is_contiguous() and not is_watched(base))
    return y if rest is None else (y, *rest)


def _fused(layer: AdaptedModule, change: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """The output of a frozen linear layer with one change; None where there is nothing to gain."""
    dtype = weight.dtype
    x = x if x.dtype == dtype else x.to(dtype)
    if type(change) is LowRank and x.numel() < change.down.numel() and change.is_product:
        # Fewer vectors than ranks: nothing else can pay, and asking takes as long as a small layer.
        return lora_linear(x, weight, bias, None, change.down, change.up, change.scale, change.dropout)
    rows, (narrow, wide) = x.numel() // x.shape[-1], sorted(weight.shape)
    summable = dtype.itemsize >= 4  # else a change that is small beside the weight would be rounded away in the sum
    if type(change) is LowRank:
        if not change.is_foldable:
            return None
        down, up = change.folded()
        up, scale = (up * change.scale, 1.0) if isinstance(change.scale, Tensor) else (up, change.scale)
        if summable and not change.dropout and costs.low_rank_as_weight(down, up, rows, narrow, wide):
            y = Product(down, up, scale).linear(x, weight, bias)
        else:
            y = lora_linear(x, weight, bias, None, down, up, scale, change.dropout)
        offset = change.bias(None)
        return y if offset is None else y + offset.to(dtype)
    if type(change) is Add:
        if change.factors is not None:
            return None
        if summable and not change.dropout and costs.add_as_weight(change, rows, narrow, wide):
            return change.matrix.linear(x, weight, bias)
        thin = change.matrix.thin()
        return None if thin is None else lora_linear(x, weight, bias, None, *thin, 1.0, change.dropout)
    if costs.map_as_low_rank(change, x.numel(), weight.numel()):
        left, right = change.thin
        up = F.linear(left.T.to(dtype), weight).T
        return lora_linear(x, weight, bias, None, right.T, up, 1.0)
    return None


def _frozen_linear(layer: AdaptedModule, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight [out, in] and bias of the base module in the dtype that a product with `x` is computed in.

    None where the module is more than that product, is trained, or is watched: then it has to be called.
    """
    base: Any = layer._modules["base_layer"]  # past `__getattr__`, which takes longer
    if (type(base) is not nn.Linear and type(base).__name__ != "Conv1D") or "forward" in base.__dict__:
        return None
    held, bias = base._parameters.get("weight"), base._parameters.get("bias")
    plain = type(held) is nn.Parameter or is_fake(held)
    if not plain or held.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if is_watched(base):
        return None
    dtype, weight = compute_dtype(x), layer.op.matrix(held)
    if weight.dtype == dtype and (bias is None or bias.dtype == dtype):
        return weight, bias
    if dtype == x.dtype:  # no autocast: the base itself says what it thinks of the mixture
        return None
    weight = weight.to(dtype)
    return weight, bias if bias is None else bias.to(dtype)


def is_watched(module: Any) -> bool:
    """Whether hooks on a module see what goes in and out, so that it has to be called."""
    own = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


# ---- with a changed weight


def _run_weight(layer: AdaptedModule, changes: Sequence[Change], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The base module run with the weight that these changes make of its own."""
    base = layer.get_base_layer()
    if layer.op.own_forward and any(getattr(change, "dropout", 0) for change in changes):
        raise ValueError(
            f"Dropout of an adapter does not work on {type(base).__name__}, whose forward is more than a product with"
            " its weight: the adapter can only change that. Set the adapter's dropout to 0."
        )
    with onloaded(base, written=False):
        weight, bias = _stand_in(layer, changes) or changed(layer, changes)
        if isinstance(layer.op, ParameterOp) and layer.below is not None:
            # The module, or a parameter of it, has other adapters too, so the layers below must run as well.
            name, depth = layer.op.weight_name, layer.count_below()
            with calling(**{f"original {name} {id(base)}": layer.original_weight()}):
                return run_with(layer.base_layer, {"base_layer." * depth + name: weight}, (x, *args), kwargs)
        if not is_plain(base, layer.op.weight_name) and x.is_floating_point() and weight.dtype != x.dtype:
            # Packed weights have no dtype of their own to compute in.
            dtype = compute_dtype(x)
            weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
        if buffers := Statistics.of(changes):
            tensors = {layer.op.weight_name: weight, layer.op.bias_name or "": bias, **buffers}
            return run_with(base, {k: v for k, v in tensors.items() if v is not None}, (x, *args), kwargs)
        return layer.op.run(base, weight, bias, x, *args, **kwargs)


def _stand_in(layer: AdaptedModule, changes: Sequence[Change]) -> tuple[Tensor, None] | None:
    """For bare parameters with low-rank changes: a weight that is multiplied with and never added up."""
    op = layer.op
    if not isinstance(op, ParameterOp) or not changes:
        return None
    products = [change for change in changes if type(change) is LowRank and change.low is change.high is None]
    if len(products) < len(changes):
        return None
    lefts, rights = [], []
    for change in products:
        down, up = change.folded()
        up = up * change.scale
        if down.dim() == 2 and op.num_experts > 1:
            down, up = down.expand(op.num_experts, *down.shape), up.unflatten(0, (op.num_experts, -1))
        elif down.dim() == 2:
            down, up = down[None], up[None]
        lefts.append(up)
        rights.append(down)
    base = layer.get_base_weight()
    if needs_plain(base, *lefts, *rights):
        if any(change.dropout for change in products):
            warn_of_no_dropout()
        return None
    # Several adapters act together as one of all their ranks.
    left, right = (lefts[0].contiguous(), rights[0]) if len(lefts) == 1 else (torch.cat(lefts, 2), torch.cat(rights, 1))
    if op.transposed:
        left, right = right.mT, left.mT
    factors = (left[0], right[0]) if base.dim() == 2 else (left, right)
    return FactoredWeight.of(base, *factors, dropout=max(change.dropout for change in products)), None


# ---- mixed batches


def run_routed(layer: AdaptedModule, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The samples of each adapter run with that adapter."""
    op, samples, known = layer.op, len(route.names), set().union(*layer.containers())
    if known.isdisjoint(route.names):
        return layer.base_layer(x, *args, **kwargs)
    x = _for_each_sample(layer, route, x)
    # An expert that is a module by itself is given the tokens that are sent to it, unless it sees whole samples.
    apart = not isinstance(x, Tensor) or layer.without_samples == "distances"
    apart = apart or (layer.without_samples == "tokens" and x.dim() < 3) or _is_sequence_first(op, x, samples)
    apart = apart or (op.kind == "Embedding" and x.dim() == 1 and len(x) != samples)  # no samples, or all in one row
    rows, rounds = 1 if apart else x.shape[op.batch_dim], None if apart else op.rounds
    groups = route.groups(rows, getattr(x, "device", torch.device("cpu")), rounds)
    here = [name for name, _ in groups if name in known]
    if len(groups) == 1:
        return run(layer, here, x, *args, **kwargs)
    sizes, vectors = [len(route.samples[name]) for name in here], x.numel() // x.shape[-1]
    blocks = op.linear and op.rounds == 1 and costs.in_blocks(sizes, len(route.names), vectors)
    stack = kept_stack(layer, here, x) if blocks else None
    changes = {name: layer.changes([name]) for name in here} if stack is None else {}
    every = [change for some in changes.values() for change in some]
    once = all(type(change).enter is Change.enter and change.acts(op) for change in every)
    if once and not op.own_forward and layout_of(layer) is None:
        # What goes in is the same for all adapters, so the base module runs once over all samples.
        y, rest = _parts(layer.base_layer(x, *args, **kwargs))
        if blocks and y.is_contiguous() and y.dtype == compute_dtype(x):
            stack = stack or new_stack(layer, changes, x)
            if stack is not None:
                keep = torch.is_grad_enabled() or needs_plain(x, y) or is_watched(layer._modules["base_layer"])
                y = stack.add(route, x, y, overwrite=not keep)
                return y if rest is None else (y, *rest)
        names = [name for name, _ in groups]
        y = _add_groups(layer, route, names, changes or {name: layer.changes([name]) for name in here}, x, y)
        return y if rest is None else (y, *rest)
    parts = []
    for name, index in groups:
        some_args, some_kwargs = op.select(index, rows, (x, *args), kwargs)
        with calling(route=Route([name]), samples=route.samples[name]):
            parts.append((index, run(layer, [name] if name in known else [], *some_args, **some_kwargs)))
    return join_rows(parts, op.batch_dim, rows)


def _for_each_sample(layer: AdaptedModule, route: Route, x: Any) -> Any:
    """The input of an embedding of positions that all samples share, once for each of them if their adapters differ."""
    if layer.op.kind != "Embedding" or len(set(route.names)) == 1 or not isinstance(x, Tensor):
        return x
    if x.dim() == 1 and layer.without_samples == "positions":
        x = x[None]
    return x.expand(len(route.names), *x.shape[1:]) if x.dim() > 1 and len(x) == 1 else x


def _is_sequence_first(op: Any, x: Tensor, samples: int) -> bool:
    """Whether samples are counted by the second dimension, as far as can be told."""
    return op.batch_dim == 0 and x.is_floating_point() and x.dim() > 2 and x.shape[0] != samples == x.shape[1]


def _add_groups(
    layer: AdaptedModule, route: Route, names: Sequence[str], changes: dict[str, list[Change]], x: Tensor, y: Tensor
) -> Tensor:
    """The output as each sample's adapter leaves it; `names` are the adapters of the route."""
    op, dim, module = layer.op, layer.op.batch_dim, layer.get_base_layer()
    order, back, sizes = route.order(x.shape[dim], x.device, op.rounds)
    fresh = dim == 0 and (order is not None or (y.is_contiguous() and not is_watched(layer._modules["base_layer"])))
    if order is not None:
        x, y = x.index_select(dim, order), y.index_select(dim, order)
    before, parts = y.split(sizes, dim), []
    for name, some_x, some_y in zip(names, x.split(sizes, dim), before, strict=True):
        for change in changes.get(name, ()):
            change = change.of_samples(route.samples[name])
            with calling(route=Route([name])) if change.needs_bias else nullcontext():
                bias = _bias(layer, change)  # as the layers below make it for these samples
            some_y = change.leave(op, module, some_x, some_y, bias, fresh)
        parts.append(some_y)
    if any(some is not other for some, other in zip(parts, before, strict=True)):  # else it was written to
        y = torch.cat(parts, dim)
    return y if back is None else y.index_select(dim, back)
