"""Low-rank Hadamard product adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core.products import add_low_rank, run_low_rank
from peft.core.scaled import ScaledConfig, ScaledLayer, ScaledTuner
from peft.ops.hadamard import expand_core, face_splitting
from peft.registry import PeftType


@dataclass
class LoHaConfig(ScaledConfig):
    """Low-rank Hadamard product (FedPara, arXiv:2108.06098).

    W' = W + alpha / r (w1_a w1_b) * (w2_a w2_b), the product of the two matrices elementwise; w1_a and w2_a are
    [out, r], w1_b and w2_b [r, in]. The change has a rank of up to r^2.

    With `use_effective_conv2d`, the factors of a convolution are cores t1, t2 [r, r, *kernel] with w1_a, w2_a [r, out]
    and w1_b, w2_b [r, in] on their two sides.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LOHA
        if self.init_weights not in (True, False):
            raise ValueError(f"init_weights must be True or False, got {self.init_weights!r}.")


class LoHaLayer(ScaledLayer):
    """A module with Hadamard products of low-rank matrices added to its weight."""

    adapter_layer_names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    label = "loha"

    hada_w1_a: nn.ParameterDict
    hada_w1_b: nn.ParameterDict
    hada_w2_a: nn.ParameterDict
    hada_w2_b: nn.ParameterDict
    hada_t1: nn.ParameterDict
    hada_t2: nn.ParameterDict

    def create(self, name: str, config: LoHaConfig, r: int = 0, alpha: float | None = None) -> None:
        super().create(name, config, r, alpha)
        r = self.r[name]
        kernel = self.effective_kernel(config)
        if kernel:
            a, b = (r, self.out_features), (r, self.in_features // math.prod(kernel))
            self.hada_t1[name], self.hada_t2[name] = _random(r, r, *kernel), _random(r, r, *kernel)
        else:
            a, b = (self.out_features, r), (r, self.in_features)
        self.hada_w1_a[name], self.hada_w1_b[name] = _random(*a), _random(*b)
        self.hada_w2_a[name], self.hada_w2_b[name] = _random(*a), _random(*b)
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b[name])

    def factors(self, name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w1_a, w1_b, w2_a, w2_b."""
        return self.hada_w1_a[name], self.hada_w1_b[name], self.hada_w2_a[name], self.hada_w2_b[name]

    def delta(self, name: str) -> Tensor:
        a1, b1, a2, b2 = self.factors(name)
        if name in self.hada_t1:
            core1, core2 = (self.hada_t1[name], b1), (self.hada_t2[name], b2)
            product = _expanded(core1, a1, core2) * _expanded(core2, a2, core1)
            return self.scaling[name] * product.flatten(1)
        return (a1 @ b1) * (self.scaling[name] * a2 @ b2)

    def cheap(self, name: str) -> bool:
        # As a chain of two thin matrices, the product with an input costs as much as with a matrix of rank r^2; with
        # its gradients, three times that. The alternative is one more product of the weight's own size.
        thin = 3 * self.r[name] ** 2 * (self.in_features + self.out_features)
        return self.op.kind == "Embedding" or (self.op.linear and thin < self.in_features * self.out_features)

    def adapt(self, name: str, below: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.op.linear:
            return super().adapt(name, below, x, *args, **kwargs)
        if self.skips(name):
            return below(x, *args, **kwargs)
        return run_low_rank(self, *self.thin_factors(name, self.kept_rows(name)), 0.0, below, x, *args, **kwargs)

    def thin_factors(self, name: str, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """The change as a product of thin matrices, [r^2, in] and [out, r^2]; its rows times `kept` [out]."""
        a1, b1, a2, b2 = self.factors(name)
        return face_splitting(b1.T, b2.T).T, face_splitting(a1, self.scaled(name, a2, kept))

    def scaled(self, name: str, a2: Tensor, kept: Tensor | None) -> Tensor:
        """w2_a times the scale, its rows times `kept`."""
        return a2 * self.scaling[name] if kept is None else a2 * (self.scaling[name] * kept.to(a2))[:, None]

    def add_product(self, name: str, x: Tensor, result: Tensor, kept: Tensor | None) -> Tensor:
        if self.op.kind == "Embedding":
            a1, b1, a2, b2 = self.factors(name)
            a2 = self.scaled(name, a2, kept)
            change = F.linear(F.embedding(x, b1.T), a1) * F.linear(F.embedding(x, b2.T), a2)
            return result + change.to(result.dtype)
        return add_low_rank(self, *self.thin_factors(name, kept), 0.0, x, result)


def _expanded(own: tuple[Tensor, Tensor], a: Tensor, other: tuple[Tensor, Tensor]) -> Tensor:
    """The tensor [out, in, *kernel] of a core with its two sides; the gradient of `a` is that of `a` on the other core.

    huggingface/peft exchanges the cores in the gradients of w1_a and w2_a, and training goes on here as it began there.
    """
    (core, b), (other_core, other_b) = own, other
    value = expand_core(core, a.detach(), b)
    if not (a.requires_grad and torch.is_grad_enabled()):
        return value
    through = expand_core(other_core.detach(), a, other_b.detach())
    return value + (through - through.detach())


def _random(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5)))


class LoHaModel(ScaledTuner):
    """A model with low-rank Hadamard product adapters."""

    prefix = "hada_"
    layer_class = LoHaLayer
