"""A weight with a low-rank change, W + L R, that is multiplied with and never added up.

Modules that hold bare parameters, fused experts above all, multiply with them in their own code, so there is no output
of a layer that a low-rank product could be added to. They get a stand-in for their parameter instead: a tensor that
knows its parts. Products with it are products with the parts, and what selects, turns or casts it does so to the parts.
Anything else sees the sum, computed when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from peft.errors import PeftRuntimeWarning, warn
from peft.ops.lora import compute_dtype, lora_linear


class FactoredWeight(Tensor):
    """W + L R in the shape of W, which is [out, in], or a stack of such matrices, or either of them transposed.

    What is multiplied with it is dropped with probability `dropout` before it meets the factors.

    It has no memory of its own. To autograd it is a function of its parts, and code that reads it past Python (an
    autograd function, say) gets the sum, so that the change reaches whatever is computed, and gradients reach L and R.
    """

    parts: tuple[Tensor, Tensor, Tensor]
    dropout: float
    _sum: Tensor | None
    _factors_by_index: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None

    @staticmethod
    def of(base: Tensor, left: Tensor, right: Tensor, dropout: float = 0.0) -> FactoredWeight:
        """base [..., m, n] + left [..., m, r] right [..., r, n]; the factors may be in another dtype."""
        weight: FactoredWeight = _StandIn.apply(base, left, right)
        weight.parts, weight._sum, weight._factors_by_index = (base, left, right), None, None
        weight.dropout = dropout
        return weight

    def summed(self) -> Tensor:
        """The weight as a plain tensor."""
        if self._sum is None:
            base, left, right = self.parts
            if self.dropout:
                warn_of_no_dropout()
            self._sum = (base + left @ right).to(base.dtype)
        return self._sum

    def factors_at(self, index: int) -> tuple[Tensor, Tensor]:
        """The factors of one matrix of a stack."""
        if self._factors_by_index is None:
            # All at once: a gradient of each by itself would be one of the whole stack.
            self._factors_by_index = self.parts[1].unbind(), self.parts[2].unbind()
        lefts, rights = self._factors_by_index
        return lefts[index], rights[index]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        way = _WAYS.get(func)
        result = NotImplemented if way is None else way(func, *args, **kwargs)
        if result is NotImplemented:
            args, kwargs = tree_map_only(FactoredWeight, FactoredWeight.summed, (args, kwargs))
            return func(*args, **kwargs)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What comes here has passed by Python; autograd knows the stand-in as `_StandIn` made it.
        args, kwargs = tree_map_only(FactoredWeight, FactoredWeight.summed, (args, kwargs or {}))
        return func(*args, **kwargs)


class _StandIn(torch.autograd.Function):
    """Makes a stand-in, and shares out the gradient of one that was used as a sum."""

    @staticmethod
    def forward(ctx: Any, base: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        made: Tensor = Tensor._make_wrapper_subclass(
            FactoredWeight, base.shape, base.stride(), dtype=base.dtype, device=base.device
        )
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        needs_base, needs_left, needs_right = ctx.needs_input_grad
        wide = grad.to(left.dtype)
        return (
            grad if needs_base else None,
            wide @ right.mT if needs_left else None,
            left.mT @ wide if needs_right else None,
        )


#: what a stand-in says about itself
_PROPERTIES = ("shape", "dtype", "device", "ndim", "requires_grad", "layout", "is_cuda")
_METADATA: frozenset[Any] = frozenset(getattr(Tensor, name).__get__ for name in _PROPERTIES) | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point,
}  # fmt: skip
#: function -> what it does with a stand-in, for those that need no sum
_WAYS: dict[Any, Callable[..., Any]] = {}


def _way(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What these functions do with a stand-in; `NotImplemented` where that takes the sum."""

    def note(way: Callable[..., Any]) -> Callable[..., Any]:
        _WAYS.update(dict.fromkeys(functions, way))
        return way

    return note


@_way(F.linear)
def _linear(func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (W + L R)^T + bias for one matrix."""
    if not isinstance(weight, FactoredWeight) or isinstance(input, FactoredWeight) or weight.dim() != 2:
        return NotImplemented
    base, left, right = weight.parts
    dtype = compute_dtype(input)
    if base.requires_grad or (bias is not None and bias.requires_grad) or base.dtype != dtype == input.dtype:
        result, base_of_product, bias = F.linear(input, base, bias), None, None
    else:
        result, base_of_product = None, base.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    p = weight.dropout
    return lora_linear(input.to(dtype), base_of_product, bias, result, right, left, 1.0, p, overwrite=True)


@_way(torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__)
def _matmul(func: Any, first: Tensor, second: Tensor, *rest: Any, **settings: Any) -> Tensor:
    """x (W + L R), or (W + L R) x, for one matrix or a stack."""
    if rest or settings or (isinstance(first, FactoredWeight) and isinstance(second, FactoredWeight)):
        return NotImplemented
    if isinstance(second, FactoredWeight):
        if second.dim() == 2:
            return _linear(F.linear, first, _transposed(second))
        dtype = compute_dtype(first)
        base, left, right = second.parts
        low_first, low_second = func(_dropped(first, second), left.to(dtype)), right.to(dtype)
        result = func(first, base)
    else:
        assert isinstance(first, FactoredWeight)
        dtype = compute_dtype(second)
        base, left, right = first.parts
        low_first, low_second = left.to(dtype), func(right.to(dtype), _dropped(second, first))
        result = func(base, second)
    if result.dim() == low_first.dim() == low_second.dim() == 3:
        return result.baddbmm_(low_first, low_second)
    return result + torch.matmul(low_first, low_second)


@_way(getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))  # of later versions
def _grouped_mm(func: Any, x: Tensor, weight: Tensor, offs: Tensor | None = None, **settings: Any) -> Tensor:
    """The product of each group of rows of x with the matrix of that group."""
    if not isinstance(weight, FactoredWeight) or isinstance(x, FactoredWeight) or weight.dim() != 3 or x.dim() != 2:
        return NotImplemented
    base, left, right = weight.parts
    # The rank is a row's length here, and rows have to lie together and be multiples of 16 bytes.
    missing = -left.shape[-1] % (16 // x.itemsize)
    left = F.pad(left.mT.to(x.dtype), (0, 0, 0, missing)).contiguous().mT
    right = F.pad(right.mT.to(x.dtype), (0, missing)).contiguous().mT
    result = func(x, base, offs=offs, **settings)
    return result.add_(func(func(_dropped(x, weight), left, offs=offs), right, offs=offs))


def _dropped(x: Tensor, weight: FactoredWeight) -> Tensor:
    return F.dropout(x, weight.dropout) if weight.dropout else x


def warn_of_no_dropout() -> None:
    """Says that the input of an adapter's factors is nowhere to be had, so that nothing of it can be dropped."""
    warn(
        "lora_dropout has no effect on a parameter that its module does more with than multiplying.",
        PeftRuntimeWarning,
    )


@_way(Tensor.__getitem__)
def _select(func: Any, weight: Any, index: Any) -> Tensor:
    """Matrices of a stack: one, or several."""
    if not isinstance(weight, FactoredWeight) or weight.dim() != 3:
        return NotImplemented
    if isinstance(index, slice) or (isinstance(index, Tensor) and index.dim() == 1):
        base, left, right = (part[index] for part in weight.parts)
        return FactoredWeight.of(base, left, right, weight.dropout)
    if isinstance(index, bool) or not isinstance(index, int | Tensor):
        return NotImplemented
    if isinstance(index, Tensor) and (index.dim() or index.is_floating_point() or index.dtype == torch.bool):
        return NotImplemented
    index = int(index)
    return FactoredWeight.of(weight.parts[0][index], *weight.factors_at(index), dropout=weight.dropout)


def _transposed(weight: FactoredWeight) -> FactoredWeight:
    base, left, right = weight.parts
    return FactoredWeight.of(base.mT, right.mT, left.mT, weight.dropout)


@_way(torch.transpose, Tensor.transpose, torch.t, Tensor.t, Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _transpose(func: Any, weight: Any, *dims: int) -> Tensor:
    """Each matrix transposed."""
    count = weight.dim()
    if dims and {dim % count for dim in dims} != {count - 2, count - 1}:
        return NotImplemented
    return _transposed(weight) if dims or count == 2 or func == Tensor.mT.__get__ else NotImplemented  # type: ignore[attr-defined]


@_way(Tensor.to, Tensor.contiguous, Tensor.float, Tensor.half, Tensor.bfloat16)
def _by_part(func: Any, weight: Any, *args: Any, **settings: Any) -> Tensor:
    """Another dtype, device or layout."""
    if not isinstance(weight, FactoredWeight):
        return NotImplemented
    base, left, right = (func(part, *args, **settings) for part in weight.parts)
    return FactoredWeight.of(base, left, right, weight.dropout)
