"""Decompositional fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.slots import Dropout, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.ops.matrix import product_with
from peft.ops.memo import remember
from peft.ops.principal import unrounded
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeFloat, PositiveInt


@dataclass
class DeftConfig(LayoutConfig, peft_type=PeftType.DEFT):
    """Decompositional fine-tuning (arXiv:2509.22793): a part of the weight is taken out and learned anew.

    W' = W - Q P'^T W + s Q R, with `deft_P` [out, r] and `deft_R` [r, in]. Q is P and P' is relu(P), or both are an
    orthonormal basis of the columns of P, so that Q P'^T is a projection.

    Args:
        r: rank; at most the number of outputs, where it is larger.
        decomposition_method: `"relu"` or `"qr"`, for the one or the other.
        init_scale: factor of the spread that a random R starts with.
        alpha: s is alpha / r; None makes it 1.
        para: only take out: there is no R.
        deft_dropout: probability of dropout on the input of R.
        init_weights: True starts R as what is taken out, so that the adapter has no effect (with `para` it has one from
            the start); False starts it at random.
    """

    r: PositiveInt = 8
    decomposition_method: Literal["relu", "qr"] = "relu"
    init_scale: NonNegativeFloat = 1.0
    alpha: PositiveInt | None = None
    para: bool = False
    deft_dropout: Fraction = 0.0
    init_weights: bool = True


class DeftLayer(AdapterLayer):
    """A module with a part of its weight exchanged."""

    deft_P = Slot()
    deft_R = Slot()

    deft_r = Setting[int]("r")
    deft_scaling = Setting[float]()
    deft_dropout = Dropout()

    def create(self, name: str, config: DeftConfig) -> None:
        r = min(config.r, self.out_features)
        self.deft_scaling[name] = 1.0 if config.alpha is None else config.alpha / r
        self.deft_P[name] = nn.Parameter(0.02 * torch.randn(self.out_features, r))
        if config.para:
            return
        if config.init_weights and not self.deft_P[name].is_meta:
            start = self.taken_out(name).detach() / self.deft_scaling[name]
        else:
            start = 0.02 * config.init_scale * torch.randn(r, self.in_features)
        self.deft_R[name] = nn.Parameter(start)

    def basis(self, name: str) -> tuple[Tensor, Tensor]:
        """Q and P', both [out, r]."""
        p = self.deft_P[name]
        if self.configs[name].decomposition_method == "relu":
            return p, p.relu()
        q = remember(p, "basis", lambda: torch.linalg.qr(unrounded(p)).Q.to(p.dtype))
        return q, q

    def taken_out(self, name: str) -> Tensor:
        """P'^T W, [r, in]."""
        _, left = self.basis(name)
        return self.remembered(lambda: product_with(left.T, self.original_matrix), self.deft_P[name])

    def change(self, name: str) -> LowRank | tuple[LowRank, LowRank]:
        q, _ = self.basis(name)
        scale, p = self.deft_scaling[name], self.dropout_of(name)
        if name not in self.deft_R:
            return LowRank(self.taken_out(name), q, scale=-1.0)
        if p:
            return LowRank(self.deft_R[name], q, scale, p), LowRank(self.taken_out(name), q, scale=-1.0)
        return LowRank(scale * self.deft_R[name] - self.taken_out(name), q)


class DeftModel(BaseTuner, layer=DeftLayer, prefix="deft_"):
    """A model with parts of its weights exchanged."""
