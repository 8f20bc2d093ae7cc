"""Low-rank Hadamard product adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from peft.core.slots import Slot
from peft.core.tuner import BaseTuner
from peft.ops.hadamard import HadamardProduct, expand_core
from peft.ops.matrix import Dense, Matrix
from peft.ops.starts import started
from peft.registry import PeftType
from peft.tuners.lycoris.scaled import LycorisConfig, LycorisLayer


@dataclass
class LoHaConfig(LycorisConfig, peft_type=PeftType.LOHA):
    """Low-rank Hadamard product (FedPara, arXiv:2108.06098).

    W' = W + alpha / r (w1_a w1_b) * (w2_a w2_b), the product of the two matrices elementwise; w1_a and w2_a are
    [out, r], w1_b and w2_b [r, in]. The change has a rank of up to r^2.

    With `use_effective_conv2d`, the factors of a convolution are cores t1, t2 [r, r, *kernel] with w1_a, w2_a [r, out]
    and w1_b, w2_b [r, in] on their two sides.
    """


class LoHaLayer(LycorisLayer):
    """A module with Hadamard products of low-rank matrices added to its weight."""

    hada_w1_a = Slot()
    hada_w1_b = Slot()
    hada_w2_a = Slot()
    hada_w2_b = Slot()
    hada_t1 = Slot()
    hada_t2 = Slot()

    def create(self, name: str, config: LoHaConfig) -> None:
        r, kernel = config.r, self.effective_kernel(config)
        if kernel:
            a, b = (r, self.out_features), (r, self.in_features // math.prod(kernel))
        else:
            a, b = (self.out_features, r), (r, self.in_features)
        self.hada_w1_a[name], self.hada_w1_b[name] = started(*a), started(*b)
        self.hada_w2_a[name], self.hada_w2_b[name] = started(*a), started(*b, zero=config.init_weights)
        if kernel:
            self.hada_t1[name], self.hada_t2[name] = started(r, r, *kernel), started(r, r, *kernel)

    def matrix(self, name: str) -> Matrix:
        a1, b1, a2, b2 = (slot[name] for slot in (self.hada_w1_a, self.hada_w1_b, self.hada_w2_a, self.hada_w2_b))
        if name not in self.hada_t1:
            return HadamardProduct(a1, b1, a2 * self.scaling[name], b2)
        core1, core2 = (self.hada_t1[name], b1), (self.hada_t2[name], b2)
        product = _expanded(core1, a1, core2) * _expanded(core2, a2, core1)
        return Dense(self.scaling[name] * product.flatten(1))


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


class LoHaModel(BaseTuner, layer=LoHaLayer, prefix="hada_"):
    """A model with low-rank Hadamard product adapters."""
