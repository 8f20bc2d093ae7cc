"""Low-rank Kronecker product adaptation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from peft.core.slots import Slot
from peft.core.tuner import BaseTuner
from peft.ops.hadamard import expand_core
from peft.ops.kronecker import Kron, factorization
from peft.ops.starts import started
from peft.registry import PeftType
from peft.tuners.lycoris.scaled import LycorisConfig, LycorisLayer
from peft.values import Range


@dataclass
class LoKrConfig(LycorisConfig, peft_type=PeftType.LOKR):
    """Low-rank Kronecker product (LyCORIS, arXiv:2309.14859).

    W' = W + alpha / r (w1 kron w2), with w1 [a, c], w2 [b, d], a b = out and c d = in. The larger factor w2, and with
    `decompose_both` w1 too, is a product of two matrices of rank r where that is smaller: w2_a [b, r], w2_b [r, d].

    With `use_effective_conv2d`, w2 of a convolution is a core t2 [r, r, *kernel] with w2_a [r, b], w2_b [r, d] on its
    two sides.

    Args:
        decompose_both: decompose w1 as well.
        decompose_factor: size of w1; -1 takes the divisors nearest to the square roots of out and in.
        rank_dropout_scale: scale the rows that `rank_dropout` leaves up for those that it takes.
        init_weights: True starts w1 at zero, `"lycoris"` starts w2 so; either way without effect. False starts at
            random.
    """

    decompose_both: bool = False
    decompose_factor: Annotated[int, Range("must be a positive integer or -1", lambda n: n > 0 or n == -1)] = -1
    rank_dropout_scale: bool = False
    init_weights: bool | Literal["lycoris"] = True  # type: ignore[assignment]


class LoKrLayer(LycorisLayer):
    """A module with a Kronecker product added to its weight."""

    lokr_w1 = Slot()
    lokr_w1_a = Slot()
    lokr_w1_b = Slot()
    lokr_w2 = Slot()
    lokr_w2_a = Slot()
    lokr_w2_b = Slot()
    lokr_t2 = Slot()

    def create(self, name: str, config: LoKrConfig) -> None:
        r, kernel = config.r, self.op.kernel
        core = self.effective_kernel(config)
        a, b = factorization(self.out_features, config.decompose_factor)
        c, d = factorization(self.in_features // math.prod(kernel), config.decompose_factor)
        zero1, zero2 = config.init_weights is True, config.init_weights == "lycoris"
        if config.decompose_both and r < max(a, c) / 2:
            self.lokr_w1_a[name], self.lokr_w1_b[name] = started(a, r, zero=zero1), started(r, c)
        else:
            self.lokr_w1[name] = started(a, c, zero=zero1)
        if r >= max(b, d) / 2:
            self.lokr_w2[name] = started(b, d, *kernel, zero=zero2)
            return
        second = (r, b) if core else (b, r)
        self.lokr_w2_a[name] = started(*second)
        self.lokr_w2_b[name] = started(r, d if core else d * math.prod(kernel), zero=zero2)
        if core:
            self.lokr_t2[name] = started(r, r, *core)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """w1 [a, c] and w2 [b, d], or [b, d, *kernel]."""
        w1 = self.lokr_w1[name] if name in self.lokr_w1 else self.lokr_w1_a[name] @ self.lokr_w1_b[name]
        if name in self.lokr_w2:
            return w1, self.lokr_w2[name]
        if name in self.lokr_t2:
            return w1, expand_core(self.lokr_t2[name], self.lokr_w2_a[name], self.lokr_w2_b[name])
        return w1, self.lokr_w2_a[name] @ self.lokr_w2_b[name]

    def matrix(self, name: str) -> Kron:
        w1, w2 = self.factors(name)
        return Kron(self.scaling[name] * w1, w2)


class LoKrModel(BaseTuner, layer=LoKrLayer, prefix="lokr_"):
    """A model with low-rank Kronecker product adapters."""
