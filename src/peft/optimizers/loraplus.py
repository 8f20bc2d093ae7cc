"""LoRA+: a higher learning rate for B than for A."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from peft.optimizers.factors import check_optimizer_class


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimizer in which the B of a LoRA learns faster than its A (arXiv:2402.12354).

    Parameter groups, in this order: A and other matrices with `lr`; both factors of embeddings with
    `loraplus_lr_embedding`; B with `lr * loraplus_lr_ratio`; biases and norms with the same and without weight decay.

    Args:
        model: a model with adapters; what is trainable in it is optimized.
        optimizer_cls: the optimizer, such as `torch.optim.AdamW`.
        lr: learning rate of A.
        loraplus_lr_ratio: how many times faster B learns. The paper finds 16 good for AdamW; the harder the task, the
            higher. `lr` is best a little lower than for plain LoRA.
        kwargs: `loraplus_lr_embedding` (1e-6) and `loraplus_weight_decay` (else `weight_decay`, else 0) are used here;
            others go to the optimizer.

    Raises:
        TypeError: `optimizer_cls` is no optimizer.
        ValueError: the ratio is not positive, or nothing is trainable.
    """
    check_optimizer_class(optimizer_cls)
    if loraplus_lr_ratio <= 0:
        raise ValueError(f"loraplus_lr_ratio must be positive, got {loraplus_lr_ratio}.")
    lr_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    decay = kwargs.pop("loraplus_weight_decay", kwargs.get("weight_decay", 0.0))
    rates = {"A": (lr, decay), "embedding": (lr_embedding, decay)}
    rates |= {"B": (lr * loraplus_lr_ratio, decay), "B without decay": (lr * loraplus_lr_ratio, 0.0)}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    norms = {id(p) for module in model.modules() if _is_norm(module) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[_kind(name, parameter, id(parameter) in norms)].append(parameter)
    if not any(groups.values()):
        raise ValueError(f"Nothing in {type(model).__name__} is trainable; is there a LoRA, and is it active?")
    return optimizer_cls(
        [{"params": groups[kind], "lr": rate, "weight_decay": decay} for kind, (rate, decay) in rates.items()],
        **{"lr": lr, **kwargs},
    )


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def _kind(name: str, parameter: nn.Parameter, in_norm: bool) -> str:
    if "lora_embedding" in name:
        return "embedding"
    if in_norm or name.endswith("bias"):
        return "B without decay"
    return "B" if "lora_B" in name or parameter.dim() == 1 else "A"
