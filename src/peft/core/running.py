"""Forward passes of one layer beyond a chain of cheap adapters: with a changed weight, and of mixed batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft.core.base_op import ParameterOp
from peft.core.routing import BASE, Route, join_rows
from peft.core.storage import is_plain, onloaded
from peft.ops.lora import compute_dtype

if TYPE_CHECKING:
    from peft.core.layer import AdapterLayer

#: ways a layer can run, decided when its state changes: the base module alone, a chain of cheap adapters on top of it,
#: or the base module with a changed weight
RUN_BASE, RUN_CHAIN, RUN_WEIGHT = range(3)


def run_with_weight(layer: AdapterLayer, names: Sequence[str], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The base module run with the weight that these adapters make of its own."""
    base = layer.get_base_layer()
    with onloaded(base):
        weight, bias = layer.weight_to_run(names)
        if isinstance(layer.op, ParameterOp) and layer.below is not None:
            # Another parameter of the module has an adapter too, so the layers below must run as well.
            inner: AdapterLayer | None = layer.below
            path = layer.op.weight_name
            while inner is not None:
                path, inner = f"base_layer.{path}", inner.below
            return torch.func.functional_call(layer.base_layer, {path: weight}, (x, *args), kwargs)
        if x.is_floating_point() and weight.dtype != x.dtype and not is_plain(base, layer.op.weight_name):
            # Packed weights have no dtype of their own to compute in.
            dtype = compute_dtype(x)
            weight, bias = weight.to(dtype), bias if bias is None else bias.to(dtype)
        return layer.op.run(base, weight, bias, x, *args, **kwargs)


def can_run_with_weight(layer: AdapterLayer, below: Callable[..., Any], x: Tensor) -> bool:
    """Whether an adapter in place `below` may run as changed weight: nothing comes before it, and nothing is lost.

    In half precision, a change that is small beside the weight would be rounded away.
    """
    weight = layer.weight
    return (
        below is layer.base_layer
        and is_plain(layer.get_base_layer(), layer.op.weight_name)
        and weight.dtype.itemsize >= 4
        and compute_dtype(x) == weight.dtype
    )


def run_routed(layer: AdapterLayer, route: Route, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The samples of each adapter run with that adapter."""
    dim = layer.op.batch_dim
    rows = x.shape[dim]
    known = set(layer.adapter_names())
    # An expert that is a module by itself is given the tokens that are sent to it, unless it sees whole samples.
    rounds = None if layer.in_expert and x.dim() < 3 else layer.op.rounds
    if rounds is None and known.isdisjoint(route.names):
        return layer.base_layer(x, *args, **kwargs)
    groups = route.groups(rows, x.device, rounds)
    here = [(name, index) for name, index in groups if name in known]
    if not here:
        return layer.base_layer(x, *args, **kwargs)
    if len(groups) == 1:
        return _run_all(layer, groups[0][0], x, *args, **kwargs)
    if layer.is_additive and all(layer.cheap(name) for name, _ in here):
        # The base module runs once over all samples.
        return layer.add_routed(route, here, x, layer.base_layer(x, *args, **kwargs))
    parts = []
    for name, index in groups:
        some_args, some_kwargs = layer.op.select(index, rows, (x, *args), kwargs)
        parts.append((index, _run_all(layer, name, *some_args, **some_kwargs)))
    return join_rows(parts, dim, rows)


def _run_all(layer: AdapterLayer, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """All of `x` with one adapter, or with none."""
    names = [name] if name != BASE and layer.has(name) else []
    with _also_below(layer, name, names):
        if not names:
            return layer.base_layer(x, *args, **kwargs)
        if layer.cheap(name):
            return layer._chain(names, x, *args, **kwargs)
        return run_with_weight(layer, names, x, *args, **kwargs)


@contextmanager
def _also_below(layer: AdapterLayer, name: str, names: list[str]) -> Iterator[None]:
    """While it lasts, the layers underneath give all samples adapter `name`, as this one does.

    Args:
        layer: the layer.
        name: the adapter's name, or the one that stands for none.
        names: it, if it is on this layer.
    """
    below, inner = layer.below, layer.read_layers()
    before = [(child._live, child._mode) for child in inner]
    for child in inner:
        child._live, child._mode = names, RUN_WEIGHT if names else RUN_BASE
    route = None if below is None else below._route
    if below is not None and route is not None:
        below._route = Route([name])
    try:
        yield
    finally:
        for child, (live, mode) in zip(inner, before, strict=True):
            child._live, child._mode = live, mode
        if below is not None:
            below._route = route
