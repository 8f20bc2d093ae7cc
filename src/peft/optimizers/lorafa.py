"""LoRA-FA: A stays as it is, and B takes the step that is best for the weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peft.errors import warn
from peft.optimizers.factors import Pair, lora_pairs, loss_of, trainable


class LoraFAOptimizer(Optimizer):
    """AdamW in which the gradient of B is multiplied by (A A^T)^-1 / scaling^2 (arXiv:2308.03303).

    That is the gradient whose product with A is nearest to the gradient of the weight itself. It is multiplied in
    bfloat16 and the order of the rest is kept too, as in huggingface/peft, so that training goes on here as it would
    there: `eps` is added before the bias of the second moment is corrected, and weights decay after their step.

    Args:
        params: what to optimize.
        pairs: factors of LoRAs; the gradients of their B are multiplied.
        lr, betas, eps, weight_decay: of AdamW.
    """

    def __init__(
        self, params: Iterable[Any], pairs: Sequence[Pair], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6, weight_decay: float = 0.0,
    ):  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pairs = list(pairs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure` evaluates the loss anew."""
        loss = loss_of(closure)
        pairs = {pair.b: pair for pair in self.pairs}
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradient = _of_b(pairs[parameter]) if parameter in pairs else parameter.grad
                    self._update(parameter, gradient, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, lr, betas = self.state[parameter], group["lr"], group["betas"]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - betas[0])
        state["exp_avg_sq"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        bias = [1 - beta ** state["step"] for beta in betas]
        spread = state["exp_avg_sq"].sqrt().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], spread, value=-lr * bias[1] ** 0.5 / bias[0])
        parameter.mul_(1 - lr * group["weight_decay"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "pairs": self.pairs}


def _of_b(pair: Pair) -> Tensor:
    """The gradient that B steps with."""
    a, b, scaling = pair
    assert b.grad is not None
    wide = a.flatten(1).to(torch.promote_types(a.dtype, torch.float32))
    # A pseudo-inverse: rows of A may depend on each other, as where r is higher than the input is wide.
    inverse = torch.linalg.pinv(wide @ wide.T, hermitian=True)
    return (b.grad.flatten(1).bfloat16() @ inverse.bfloat16() / scaling**2).to(b.dtype).view_as(b)


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """An optimizer that trains B alone: less memory, for the inputs of the layers need not be kept (arXiv:2308.03303).

    The A of every LoRA in the model is frozen. What is trainable beside the LoRAs is optimized by AdamW.

    Args:
        model: a model with LoRAs.
        r, lora_alpha: as in the configuration. Each layer's own scale is what counts.
        lr, weight_decay: of AdamW.
        use_rslora: as in the configuration; need not be given.

    Raises:
        ValueError: the model has no LoRA, or `use_rslora` is not as in the configuration.
    """
    if r < 1 or lr < 0:
        raise ValueError(f"r must be positive and lr not negative, got r={r}, lr={lr}.")
    pairs = lora_pairs(model)
    if not pairs:
        raise ValueError(f"{type(model).__name__} has no LoRA (lora_A and lora_B) to train.")
    _compare(model, {"r": r, "lora_alpha": lora_alpha}, use_rslora)
    for pair in pairs:
        pair.a.requires_grad_(False)
    return LoraFAOptimizer(trainable(model), pairs, lr=lr, weight_decay=weight_decay)


def _compare(model: Any, given: dict[str, Any], use_rslora: bool | None) -> None:
    """Raises or warns where the model's configurations say something else."""
    for name, config in getattr(model, "peft_config", {}).items():
        if use_rslora is not None and config.use_rslora != use_rslora:
            raise ValueError(f"use_rslora={use_rslora}, but adapter {name!r} has {config.use_rslora}; leave it out.")
        other = [key for key, value in given.items() if getattr(config, key) != value]
        if other:
            said = ", ".join(f"{key}={given[key]}" for key in other)
            warn(f"{said} is not what the configuration of adapter {name!r} says, which is what counts.")
