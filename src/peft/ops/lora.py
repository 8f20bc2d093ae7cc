"""The product of a linear layer with a low-rank adapter, with as little beside the layer's own as there can be.

y = x W^T + b + s (drop(x) A^T) B^T. Beyond the frozen layer, a training step keeps x (where no norm or gate
before it keeps what x is made of), the r columns of x A^T and, with dropout, a bit per element of x; the low-rank
products are added into the layer's output and into the gradient of x in place.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft.ops.dropout import draw_mask, mask_factors, pieces
from peft.ops.internals import any_autocast, has_half_instructions, is_fake, is_transformed, kept_product


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in."""
    if not any_autocast():
        return x.dtype
    kind = x.device.type
    # Nothing is cast on the meta device; double precision, autocast leaves alone.
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What thin products are computed in: float32 where a processor has no instructions for `dtype`.

    They take some ten times as long there in half precision, and a few casts are nothing beside that.
    """
    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16) or has_half_instructions(dtype):
        return dtype
    return torch.float32


#: rows of x up to which a processor multiplies them faster in float32 than it casts factors to half precision
_FEW = 32
#: entries of a weight that are worked on at a time: few enough for a processor's cache
_PIECE = 1 << 18


def add_low_rank(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling B A as a new tensor in the dtype of W, computed in that of the factors and rounded once.

    A few rows at a time, so that nothing of the size of W is made in the larger dtype.

    Args:
        weight: W [out, in], in rows or in columns (a transposed view).
        a: [r, in].
        b: [out, r].
    """
    if weight.stride(0) < weight.stride(1):
        return add_low_rank(weight.T, b.T, a.T, scaling).T
    rows = max(1, _PIECE // weight.shape[1]) if weight.device.type == "cpu" else weight.shape[0]
    if rows >= len(weight):
        return torch.addmm(weight.to(b.dtype), b, a, alpha=scaling).to(weight.dtype)
    result = torch.empty_like(weight)
    for some, out, factor in zip(weight.split(rows), result.split(rows), b.split(rows), strict=True):
        out.copy_(torch.addmm(some.to(b.dtype), factor, a, alpha=scaling))
    return result


def lora_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    result: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    p: float = 0.0,
    overwrite: bool = False,
) -> Tensor:
    """x W^T + b + scaling (drop(x) A^T) B^T.

    Args:
        x: [..., in].
        weight: [out, in], frozen; None where `result` is given.
        bias: [out], frozen, or None.
        result: x W^T + b where something else has computed it: [..., out].
        a: [r, in]; cast where it is used, so that autograd keeps the parameter and no copy.
        b: [out, r]; the same.
        scaling: s.
        p: probability of dropout on the adapter's input.
        overwrite: whether `result` is nobody else's and may be overwritten.
    """
    if needs_plain(x, a, b, weight if result is None else result):
        result = F.linear(x, weight, bias) if result is None else result  # type: ignore[arg-type]
        return result + F.linear(F.linear(F.dropout(x, p), a.to(x.dtype)), b.to(x.dtype)) * scaling
    if p == 0 and not torch.is_grad_enabled() and 0 < x.numel() <= _FEW * x.shape[-1] and not x.is_cuda:
        own = result if result is None or overwrite else result.clone(memory_format=torch.contiguous_format)
        return _few(x, weight, bias, own, a, b, scaling)
    learns = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad)
    if torch.is_grad_enabled():
        # Writing into a view would tell autograd of the whole that it shows.
        overwrite = overwrite and result is not None and not result._is_view()
    whole = a.requires_grad and b.requires_grad and x.dim() > 1
    if learns and whole:
        return _LoraLinear.apply(x, weight, bias, result, a, b, scaling, p, overwrite)
    out = F.linear(x, weight, bias) if result is None else result  # type: ignore[arg-type]
    # The masks are the same with gradients and without: checkpointing runs once with and once without.
    if learns:  # with a frozen factor there is less to keep than `_LoraLinear` does
        dropped = x if p == 0 else x * mask_factors(draw_mask(x.numel(), p, x.device), p, x)
        low = F.linear(dropped, a.to(x.dtype)).reshape(-1, len(a))
        return _add_product(out, low, b, scaling, False)
    low, _ = _down(x, a, p)
    return _add_product(out, low, b, scaling, overwrite or result is None)


def _few(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, out: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """The same for few rows, as in decoding; `out`, x W^T + b if given, is overwritten.

    Processors multiply few rows faster in float32 than in half precision, instructions for that or not, so it is x and
    the product that are cast; and one row asks for products with a vector. Decoding takes half the time that it takes
    without (`benchmarks/decode.py`).
    """
    if a.dtype != b.dtype or (a.dtype.itemsize < 4 and x.device.type == "cpu"):
        a, b = a.float(), b.float()
    if x.numel() > x.shape[-1]:
        out = F.linear(x, weight, bias) if out is None else out  # type: ignore[arg-type]
        low = F.linear(_as(x, a.dtype), a)
        if out.dtype == b.dtype:
            out.view(-1, out.shape[-1]).addmm_(low.reshape(-1, len(a)), b.t(), alpha=scaling)
        else:
            out.add_(F.linear(low, b), alpha=scaling)
        return out
    row = x.reshape(-1)
    if out is None:
        flat = torch.mv(weight, row) if bias is None else torch.addmv(bias, weight, row)  # type: ignore[arg-type]
    else:
        flat = out.view(-1)
    low = torch.mv(a, _as(row, a.dtype))
    flat.addmv_(b, low, alpha=scaling) if flat.dtype == b.dtype else flat.add_(torch.mv(b, low), alpha=scaling)
    return flat.view(*x.shape[:-1], -1) if out is None else out


def needs_plain(*tensors: Tensor | None) -> bool:
    """Whether the tensors, or who is watching, ask for operations that can be traced, transformed or sharded."""
    if torch.compiler.is_compiling() or is_transformed():
        return True
    for tensor in tensors:  # a loop, as this runs in each layer for each token that is decoded
        kind = type(tensor)
        if kind is not Tensor and kind is not torch.nn.Parameter and tensor is not None and not is_fake(tensor):
            return True
    return False


def _mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left right, computed in `dtype` whatever autocast says: it leaves products alone that are told where to go."""
    if left.is_meta or not torch.is_autocast_enabled(left.device.type):
        return torch.mm(_as(left, dtype), _as(right, dtype))
    out = torch.empty(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    return torch.mm(left.to(dtype), right.to(dtype), out=out)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _add_product(out: Tensor, low: Tensor, b: Tensor, scaling: float, overwrite: bool) -> Tensor:
    """out + scaling low B^T, in place if `overwrite`."""
    flat = out.view(-1, out.shape[-1]) if overwrite else out.reshape(-1, out.shape[-1])
    if low.dtype != out.dtype:
        product = _mm(low, b.T * scaling, low.dtype)
        if not overwrite:
            return (flat + product).to(out.dtype).view(out.shape)
        flat.add_(product)
        return out
    b = _as(b, out.dtype)
    if overwrite:
        flat.addmm_(low, b.T, alpha=scaling)
        return out
    return torch.addmm(flat, low, b.T, alpha=scaling).view(out.shape)


def _down(x: Tensor, a: Tensor, p: float) -> tuple[Tensor, Tensor | None]:
    """drop(x) A^T as a matrix [rows, r], and the mask, if any."""
    flat, dtype = x.reshape(-1, x.shape[-1]), _product_dtype(x.dtype, x.device)
    if p == 0:
        return _mm(flat, a.T, dtype), None
    mask, a = draw_mask(x.numel(), p, x.device), a.to(dtype)
    low = torch.empty(len(flat), len(a), dtype=dtype, device=x.device)
    for some, factors in pieces(mask, p, flat):
        torch.mm(factors.mul_(flat[some]).to(dtype), a.T, out=low[some])
    return low, mask


class _LoraLinear(torch.autograd.Function):
    """The product and its gradients; x, A and B all tracked or x alone not, and W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        result: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        p: float,
        overwrite: bool,
    ) -> Tensor:
        out = F.linear(x, weight, bias) if result is None else result  # type: ignore[arg-type]
        low, mask = _down(x, a, p)
        out = _add_product(out, low, b, scaling, overwrite or result is None)
        if overwrite:
            ctx.mark_dirty(result)
        ctx.scaling, ctx.p, ctx.shape = scaling, p, x.shape
        # The input of a gated MLP's down projection, the widest of all, and those of projections behind a norm are
        # products whose factors autograd keeps: to keep x as well would double what this costs.
        ctx.save_for_backward(weight if result is None else None, low, a, b, mask, *kept_product(x))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, low, a, b, mask, *factors = ctx.saved_tensors
        flat, factors = grad.flatten(0, -2), [f if f.dim() == 1 else f.flatten(0, -2) for f in factors]
        gradients = _differentiable_gradients if torch.is_grad_enabled() else _gradients
        grad_x, grad_a, grad_b = gradients(
            ctx.needs_input_grad[0], flat, factors, weight, low, a, b, mask, ctx.scaling, ctx.p
        )
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad if ctx.needs_input_grad[3] else None, grad_a, grad_b, None, None, None


def _differentiable_gradients(
    wants_x: bool, grad: Tensor, of_x: Sequence[Tensor], weight: Tensor | None, low: Tensor, a: Tensor, b: Tensor,
    mask: Tensor | None, scaling: float, p: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, A and B for a second derivative: all from tensors with a history, so x A^T once more."""
    x = product_of(of_x)
    factors = 1.0 if mask is None else mask_factors(mask, p, x)
    here_a, here_b = a.to(x.dtype), b.to(x.dtype)
    dropped, grad_low = x * factors, grad @ here_b * scaling
    grad_x = grad_low @ here_a * factors
    if weight is not None:
        grad_x = grad_x + grad @ weight
    grad_a, grad_b = grad_low.T @ dropped, grad.T @ F.linear(dropped, here_a) * scaling
    return grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype)


def _gradients(
    wants_x: bool, grad: Tensor, of_x: Sequence[Tensor], weight: Tensor | None, low: Tensor, a: Tensor, b: Tensor,
    mask: Tensor | None, scaling: float, p: float,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, the product of `of_x` (of x through W as well, where that is given), A and B."""
    dtype = low.dtype
    grad = grad.to(dtype)
    grad_low = _mm(grad, b if scaling == 1 else _as(b, dtype) * scaling, dtype)
    # The thin one first, which takes half the time; then as it lies in B.
    grad_b = _mm(low.T, grad, dtype).T.contiguous()
    if scaling != 1:
        grad_b.mul_(scaling)
    grad_x = None
    if wants_x and mask is None and weight is not None:
        grad_x = _add_mm(None, grad, weight, dtype).addmm_(grad_low, a.to(dtype))
    elif wants_x:
        grad_x = _mm(grad_low, a, dtype)
    if mask is None:
        grad_a = _grad_a(grad_low, of_x)
    else:
        grad_a = _through_dropout(grad_x, of_x, grad_low, mask, p)
        if grad_x is not None and weight is not None:
            _add_mm(grad_x, grad, weight, dtype)
    return None if grad_x is None else grad_x.to(of_x[0].dtype), grad_a.to(a.dtype), grad_b.to(b.dtype)


def _grad_a(grad_low: Tensor, of_x: Sequence[Tensor]) -> Tensor:
    """grad_low^T x; numbers per row or column of x are multiplied into what is thin."""
    whole, columns = [of_x[0]], list[Tensor]()
    for factor in of_x[1:]:
        if factor.dim() == 1:
            columns.append(factor)
        elif factor.shape[1] == 1:
            grad_low = grad_low * factor
        else:
            whole.append(factor)
    return product_of([_mm(grad_low.T, product_of(whole), grad_low.dtype), *columns])


def product_of(factors: Sequence[Tensor]) -> Tensor:
    """The product of factors, entry by entry."""
    return reduce(operator.mul, factors)


def _add_mm(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """total + left right, in place; all of `right` is not cast at once."""
    if right.dtype == dtype:
        return _mm(left, right, dtype) if total is None else total.addmm_(left, right)
    if total is None:
        total = torch.zeros(left.shape[0], right.shape[1], dtype=dtype, device=left.device)
    rows = max(1, _PIECE * 16 // right.shape[1])
    for part, some in zip(left.split(rows, 1), right.split(rows), strict=True):
        total.addmm_(part, some.to(dtype))
    return total


def _through_dropout(grad: Tensor | None, of_x: Sequence[Tensor], grad_low: Tensor, mask: Tensor, p: float) -> Tensor:
    """grad_low^T drop(x); `grad`, if there is one, is multiplied with what dropout has multiplied x with."""
    dtype = torch.promote_types(grad_low.dtype, torch.float32)  # the sum of pieces is not to be rounded after each
    total = torch.zeros(grad_low.shape[1], of_x[0].shape[1], dtype=dtype, device=grad_low.device)
    for some, factors in pieces(mask, p, of_x[0]):
        if grad is not None:
            grad[some].mul_(factors)
        for factor in of_x:
            factors.mul_(factor if factor.dim() == 1 else factor[some])
        left = grad_low[some].T
        if left.dtype == dtype:
            total.addmm_(left, factors.to(dtype))
        else:
            total.add_(left @ factors)
    return total
