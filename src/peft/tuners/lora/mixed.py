"""Mixed batches: the product of each sample with its own adapter, in two batched products however many adapters.

The factors of all of them are stacked. Without gradients a layer keeps the stack for batches to come: while tokens are
generated nothing but the tokens changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft.core.products import hooks_of, is_watched
from peft.core.routing import Route
from peft.ops import fused
from peft.ops.lora import needs_plain

if TYPE_CHECKING:
    from peft.tuners.lora.layer import LoraLayer


def add_routed(layer: LoraLayer, route: Route, names: Sequence[str], x: Tensor, result: Tensor) -> Tensor | None:
    """`result` with each sample's adapter added; it may be written to. None where stacks do not serve.

    Args:
        names: the adapters of the route that the layer has.
    """
    watched = torch.is_grad_enabled() or is_watched(layer.base_layer)
    rank = max(layer.r[name] for name in names)
    by_kernels = fused.wanted(result, rank, few=True) and not (watched or needs_plain(x, result))
    stack = _stack_for(layer, names, result)
    if stack is None:
        return None
    if by_kernels:
        blocks = _row_blocks(route, names, result)
        return fused.add_routed(x.to(result.dtype), result, *stack.in_order(names), blocks)
    # A sample's rows lie next to each other.
    rows = x.to(result.dtype).reshape(len(route.names), -1, x.shape[-1])
    flat = result.view(len(route.names), -1, result.shape[-1])
    a, b = stack.in_order(route.names)
    low = torch.bmm(rows, a.mT)
    if watched:
        return torch.baddbmm(flat, low, b.mT).view(result.shape)
    flat.baddbmm_(low, b.mT)
    return result


def _stack_for(layer: LoraLayer, names: Sequence[str], like: Tensor) -> Stack | None:
    """The factors of `names`, and maybe more; None if the product is not all that they do."""
    if not like.is_contiguous():
        return None
    kept: Stack | None = layer.__dict__.get("_stack")
    if kept is not None and not torch.is_grad_enabled() and kept.serves(layer, names, like):
        return kept
    if any(name in layer.lora_variant and not layer.lora_variant[name].is_product for name in names):
        return None
    factors = [entries[name] for name in names for entries in (layer.lora_A, layer.lora_B)]
    if not all(is_plain(module) and module.bias is None for module in factors):
        return None
    stack = Stack(layer, names, like)
    if not torch.is_grad_enabled():
        layer.__dict__["_stack"] = stack
    return stack


class Stack:
    """The factors of several adapters, one behind the other, and what they were made of."""

    def __init__(self, layer: LoraLayer, names: Sequence[str], like: Tensor):
        self.names, self.dtype, self.device = list(names), like.dtype, like.device
        self.scales = [layer.scaling[name] for name in names]
        self.places = [place for name in names for place in _places(layer, name)]
        self.tensors = [entry for _, _, entry in self.places if isinstance(entry, Tensor)]
        self.versions = [tensor._version for tensor in self.tensors]
        modules = [entry for _, _, entry in self.places if isinstance(entry, nn.Module)]
        self.hooks = [hooks for module in modules for hooks in hooks_of(module)]
        r = max(layer.r[name] for name in names)
        factors = [layer.live_factors(name) for name in names]
        self.a = torch.stack([_padded(a, 0, r) for a, _ in factors]).to(like.dtype)
        # Transposed in memory: the product with few rows takes half the time that way.
        self.b = torch.stack([_padded(b.T, 0, r) for _, b in factors]).to(like.dtype)
        self.b = self.b * like.new_tensor(self.scales)[:, None, None]
        self._order = self.names
        self._ordered = self.a, self.b.mT

    def serves(self, layer: LoraLayer, names: Sequence[str], like: Tensor) -> bool:
        """Whether these are there and as they were. Asked in every layer for every token: it may cost little."""
        return (
            like.dtype == self.dtype
            and like.device == self.device
            and not any(self.hooks)
            and [layer.scaling[name] for name in self.names] == self.scales
            and [tensor._version for tensor in self.tensors] == self.versions
            and all(held.get(key) is entry for held, key, entry in self.places)
            and (names == self.names or set(names) <= set(self.names))
        )

    def in_order(self, order: Sequence[str]) -> tuple[Tensor, Tensor]:
        """A [order, r, in] and B [order, out, r] of each adapter in `order`: zeros for what is none of these.

        Lower ranks are padded with zeros; the scale is in B.
        """
        if order != self._order:
            nothing = len(self.names)
            position = {name: i for i, name in enumerate(self.names)}
            index = torch.tensor([position.get(name, nothing) for name in order], device=self.device)
            a, b = self.a, self.b
            if nothing in index:
                a, b = _padded(a, 0, nothing + 1), _padded(b, 0, nothing + 1)
            self._order, self._ordered = list(order), (a[index], b[index].mT)
        return self._ordered


def _places(layer: LoraLayer, name: str) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where the parameters of an adapter and the modules around them are held: dictionary, key and entry."""
    for entries in layer.containers():
        if name not in entries:
            continue
        entry = entries[name]
        if not isinstance(entry, nn.Module):
            yield entries._parameters, name, entry
            continue
        yield entries._modules, name, entry
        for module in entry.modules():
            yield module.__dict__, "forward", None
            yield from ((module._parameters, key, parameter) for key, parameter in module._parameters.items())


def _padded(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` with zeros behind it in one dimension, up to `size`."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)


def _row_blocks(route: Route, names: Sequence[str], like: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of `like` by adapter, as the kernels want them; worked out once for a route."""
    rows = like[..., 0].numel()
    key = rows, like.device, *names
    if key not in route.prepared:
        indices = route.indices(rows)
        route.prepared[key] = fused.row_blocks([indices[name] for name in names], like.device)
    return route.prepared[key]


def is_plain(module: nn.Module) -> bool:
    """Whether a factor is the linear layer that it seems, with nobody watching."""
    return type(module) is nn.Linear and not is_watched(module) and "forward" not in module.__dict__
