"""Riemannian preconditioning: steps that depend on the product of the factors rather than on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft.optimizers.factors import Pair, check_optimizer_class, lora_pairs, loss_of, trainable


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 0.01, **kwargs: Any
) -> Optimizer:
    """An optimizer whose gradients of A and B are preconditioned (arXiv:2402.02347).

    The gradient of A is multiplied by (B^T B + reg I)^-1 from the left, that of B by (A A^T + reg I)^-1 from the right,
    so that a step changes B A alike however the product is shared out between them.

    Args:
        model: a model with LoRAs; what is trainable in it is optimized. LoRAs on embeddings and what is no LoRA are
            optimized as `optimizer_cls` does.
        optimizer_cls: the optimizer, such as `torch.optim.AdamW`.
        lr: its learning rate.
        reg: damping of the inverse; above 0, for B is zero at the start.
        kwargs: go to the optimizer.

    Returns:
        An instance of a subclass of `optimizer_cls`.

    Raises:
        TypeError: `optimizer_cls` is no optimizer.
        ValueError: the model has no trainable LoRA, `reg` is not positive, or the optimizer evaluates the loss several
            times in a step (LBFGS).
    """
    check_optimizer_class(optimizer_cls)
    closure = signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ValueError(f"{optimizer_cls.__name__} evaluates the loss anew within a step; choose one that does not.")
    if reg <= 0:
        raise ValueError(f"reg must be positive, got {reg}.")
    pairs = [pair for pair in lora_pairs(model) if pair.a.requires_grad or pair.b.requires_grad]
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no trainable lora_A and lora_B, which this optimizer is for.")
    made: Any = _class_for(optimizer_cls)  # type: ignore[arg-type]
    optimizer = made(trainable(model), lr=lr, **kwargs)
    optimizer.pairs, optimizer.reg = pairs, reg
    return optimizer


class Riemannian(Optimizer):
    """Mixed into an optimizer, lets it step with preconditioned gradients; those of the parameters stay as they are."""

    pairs: list[Pair]
    reg: float
    optimizer_cls: type[Optimizer]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` evaluates the loss anew and is called once."""
        loss = loss_of(closure)
        own: list[tuple[nn.Parameter, Tensor | None]] = []
        # All of them first: the gradient of one factor depends on the values of the other.
        for parameter, gradient in list(self._preconditioned()):
            own.append((parameter, parameter.grad))
            parameter.grad = gradient
        try:
            step: Any = self.optimizer_cls.step
            # torch wraps the `step` of each class in the hooks of the optimizer; once is enough.
            (step.__wrapped__ if getattr(step, "hooked", False) else step)(self)
        finally:
            for parameter, before in own:
                parameter.grad = before
        return loss

    def _preconditioned(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        for a, b, _ in self.pairs:
            if a.grad is not None:
                yield a, _solve(b.flatten(1).T, a.grad.flatten(1), self.reg).view_as(a)
            if b.grad is not None:
                yield b, _solve(a.flatten(1), b.grad.flatten(1).T, self.reg).T.reshape(b.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pairs": self.pairs, "reg": self.reg}

    def __reduce__(self) -> Any:
        # The class is made on the fly, so pickle and copy have to be told how.
        return _bare, (self.optimizer_cls,), self.__getstate__()


def _solve(factor: Tensor, gradient: Tensor, reg: float) -> Tensor:
    """(F F^T + reg I)^-1 G for a factor F [r, n] and a gradient G [r, m], in the dtype of G."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    gram = wide @ wide.T
    gram.diagonal().add_(reg)
    return torch.cholesky_solve(gradient.to(wide.dtype), torch.linalg.cholesky(gram)).to(gradient.dtype)


@lru_cache
def _class_for(optimizer_cls: Any) -> Any:
    return type(f"Riemannian{optimizer_cls.__name__}", (Riemannian, optimizer_cls), {"optimizer_cls": optimizer_cls})


def _bare(optimizer_cls: type[Optimizer]) -> Optimizer:
    made: Any = _class_for(optimizer_cls)  # type: ignore[arg-type]
    return made.__new__(made)
