"""Mixed batches: the factors of all adapters of a layer side by side, so that each sample is multiplied with its own in
two batched products, however many adapters there are.

Without gradients they are kept side by side for the batches to come: while tokens are generated nothing but the tokens
changes, and to collect the factors anew takes twice as long as a small model's pass (`benchmarks/decode.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.adapted import AdaptedModule
from peft.core.change import Change, LowRank
from peft.core.routing import Route
from peft.ops.internals import fsdp_modules
from peft.ops.lora import compute_dtype, needs_plain

#: where modules have hooks that see what goes in and out
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: stacks that a layer keeps: a serving process has a few batches at a time
_KEPT = 2


class Stack:
    """A [n, r, in] and (s B)^T [n, r, out] of n adapters, zero beyond the rank of each."""

    def __init__(self, products: Mapping[str, LowRank], dtype: torch.dtype):
        self.places, self.dtype = {name: place for place, name in enumerate(products)}, dtype
        self.products = list(products.values())
        self.dropout = self.products[0].dropout
        rank = max(len(product.down) for product in self.products)
        downs = [_filled_up(product.down, rank) for product in self.products]
        # Transposed in memory, B is multiplied with in half the time.
        ups = [_filled_up((product.up * product.scale).T, rank) for product in self.products]
        self.down, self.up = torch.stack(downs).to(dtype), torch.stack(ups).to(dtype)

    def keep(self, layer: AdaptedModule) -> None:
        """Leaves itself to later batches, with what has to stay as it is for that."""
        self.factors = [factor for product in self.products for factor in (product.down, product.up)]
        self.stamps, self.learned = self._stamps(), set[int]()
        containers = layer.containers()
        inside = [own for held in containers for name in self.places for own in _modules_in(held, name)]
        self.modules = [module.__dict__ for module in inside]
        self.hooks = [own[kind] for own in self.modules for kind in HOOKS]
        self.holders = [layer.settings, *layer.settings.values(), *(module._parameters for module in inside)]
        self.holders += [entries for held in containers for entries in (held._modules, held._parameters)]
        self.held = [value for holder in self.holders for value in holder.values()]
        others = (other for other in layer.__dict__.get("_stacks", ()) if other.places != self.places)
        layer.__dict__["_stacks"] = _Kept([self, *others][:_KEPT])

    def _stamps(self) -> list[tuple[int, int]]:
        return [(factor._version, factor.data_ptr()) for factor in self.factors]

    def serves(self, names: Sequence[str], dtype: torch.dtype) -> bool:
        """Whether it has these adapters as they are. Asked in every layer for every token: it may cost little."""
        now = chain(chain.from_iterable(map(dict.values, self.holders)), (None,))
        return (
            dtype == self.dtype
            and len(self.places) <= 2 * len(names)  # those of the others are asked and left out, for each token
            and all(name in self.places for name in names)
            and not any(self.hooks)
            and not any(map(dict.__contains__, self.modules, repeat("forward")))
            and not any(map(itemgetter("training"), self.modules))
            and all(map(is_, now, (*self.held, None)))
            and self._stamps() == self.stamps
        )

    def refresh(self) -> None:
        """Copies what is trained anew: optimisers may write to it in ways that leave no trace."""
        learns = {index // 2 for index, factor in enumerate(self.factors) if factor.requires_grad}
        for place in learns | self.learned:
            product = self.products[place]
            self.down[place, : len(product.down)] = product.down
            self.up[place, : len(product.down)] = (product.up * product.scale).T
        self.learned = learns

    def add(self, route: Route, x: Tensor, y: Tensor, overwrite: bool) -> Tensor:
        """y, which is contiguous, with what each sample's adapter makes of x; in place if `overwrite`."""
        names = [name for name in self.places if name in route.samples]
        down, up = self.down, self.up
        if len(names) < len(self.places):
            some = torch.tensor([self.places[name] for name in names], device=x.device)
            down, up = down.index_select(0, some), up.index_select(0, some)
        x = x.to(self.dtype)
        x = (F.dropout(x, self.dropout) if self.dropout else x).reshape(len(x), -1)
        blocks, flat = route.blocks(names, len(x), x.device), y.view(len(y), -1)
        x = x if blocks is None else x.index_select(0, blocks[0])
        low = torch.bmm(x.view(len(names), -1, down.shape[2]), down.mT)
        if blocks is None:
            flat = flat.view(len(names), -1, up.shape[2])
            return (flat.baddbmm_(low, up) if overwrite else torch.baddbmm(flat, low, up)).view(y.shape)
        some = torch.bmm(low, up).view(len(x), -1).index_select(0, blocks[1])
        return (flat.index_add_(0, blocks[2], some) if overwrite else flat.index_add(0, blocks[2], some)).view(y.shape)


class _Kept(list[Stack]):
    """The stacks that a layer keeps, the last one first; copies of the layer go without."""

    def __reduce__(self) -> Any:
        return _Kept, ()


def _filled_up(factor: Tensor, rank: int) -> Tensor:
    return factor if len(factor) == rank else F.pad(factor, (0, 0, 0, rank - len(factor)))


def _modules_in(container: Any, name: str) -> list[nn.Module]:
    entry = container._modules.get(name)
    return [] if entry is None else list(entry.modules())


def kept_stack(layer: AdaptedModule, names: Sequence[str], x: Tensor) -> Stack | None:
    """The stack that an earlier batch has left, if it still is that of these adapters."""
    if torch.is_grad_enabled() or needs_plain(x):
        return None
    for stack in layer.__dict__.get("_stacks", ()):
        if stack.serves(names, compute_dtype(x)):
            with torch.no_grad():
                stack.refresh()
            return stack
    return None


def new_stack(layer: AdaptedModule, changes: Mapping[str, Sequence[Change]], x: Tensor) -> Stack | None:
    """The stack of these adapters, kept where it may be; None if they do more than multiply with two factors each."""
    products: dict[str, LowRank] = {}
    for name, some in changes.items():
        product = some[0] if len(some) == 1 else None
        if type(product) is not LowRank or not product.is_product or isinstance(product.scale, Tensor):
            return None
        products[name] = product
    if len({product.dropout for product in products.values()}) > 1:
        return None
    if torch.is_grad_enabled() or layer.training or needs_plain(x) or not all(map(_may_be_kept, products.values())):
        return Stack(products, compute_dtype(x))
    with torch.inference_mode(False), torch.no_grad():  # it may be written to elsewhere
        stack = Stack(products, compute_dtype(x))
    if not fsdp_modules():
        stack.keep(layer)
    return stack


def _may_be_kept(product: LowRank) -> bool:
    """Whether a product's factors are parameters that tell when they are written to; DeepSpeed's do not."""
    return all(
        type(factor) is nn.Parameter and not (factor.is_inference() or factor.is_meta or hasattr(factor, "ds_id"))
        for factor in (product.down, product.up)
    )
