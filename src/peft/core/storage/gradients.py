"""Quantised layers that pass no gradient on: those that quantise their input too, or have been made for evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from peft.core.storage.quantised import QUANTISED, Quantised


def blocking(modules: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Names of those modules whose input gets no gradient, though it should."""
    return [name for name, module in modules if _blocks(module) and _pass_on not in module._forward_hooks.values()]


def let_gradients_through(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Gives the input of such modules the gradient that it would have if it were not quantised."""
    for name, module in modules:
        if blocking([(name, module)]):
            module.register_forward_hook(_pass_on)


def keep_open(modules: Iterable[nn.Module]) -> None:
    """Sees to it that quantised weights which evaluation has packed are unpacked where a gradient is to go through."""
    for module in modules:
        kind = _kind_of(module)
        if kind is not None and kind.may_pack(module) and _unpack not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_unpack)


def _unpack(module: nn.Module, args: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and args and args[0].requires_grad:
        kind = _kind_of(module)
        if kind is not None:
            kind.unpack(module)


def _blocks(module: nn.Module) -> bool:
    kind = _kind_of(module)
    return kind is not None and not kind.passes_gradient(module, "weight")


def _kind_of(module: nn.Module) -> Quantised | None:
    weight = module._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter:
        return None
    return next((kind for kind in QUANTISED if kind.holds(module, "weight", weight)), None)


def _pass_on(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    if not torch.is_grad_enabled() or not args[0].requires_grad or not _blocks(module):
        return output
    return _StraightThrough.apply(args[0], output, module)


class _StraightThrough(torch.autograd.Function):
    """An output, with the gradient for its input as if that were not rounded (arXiv:1308.3432)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.dtype = module, x.dtype
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight = _kind_of(ctx.module).read(ctx.module, "weight")  # type: ignore[union-attr]
        return (grad.to(weight.dtype) @ weight).to(ctx.dtype), grad, None
