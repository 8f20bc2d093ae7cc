"""Granular low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peft.config import LayoutConfig
from peft.core.change import Add, Change, LowRank
from peft.core.scale import ScaledLayer
from peft.core.slots import Dropout, ModuleSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.granular import Granular
from peft.ops.starts import linears, uniform
from peft.registry import PeftType
from peft.values import Divisor, Fraction, NonNegativeInt, PositiveInt


@dataclass
class GraloraConfig(LayoutConfig, peft_type=PeftType.GRALORA):
    """Granular low-rank adaptation (arXiv:2505.20355): W' = W + alpha / (r + hybrid_r) (M + B A).

    M is cut into gralora_k x gralora_k blocks, each of rank r / gralora_k with factors of its own: `gralora_A`
    [k, in / k, r] and `gralora_B` [k, r, out / k]. It has as many values as a matrix of rank r and is of rank
    gralora_k * r. B A is of rank hybrid_r: `gralora_A_general` and `gralora_B_general`.

    Args:
        r: rank of a row of blocks, which gralora_k divides.
        hybrid_r: rank of the part that has no blocks; 0 leaves it out.
        alpha: numerator of the scale.
        gralora_dropout: probability of dropout on the adapter's input.
        gralora_k: blocks along each side of the weight, which it divides.
        init_weights: start with factors of zero on the side of the output, without effect; False starts at random.
    """

    r: PositiveInt = 32
    hybrid_r: NonNegativeInt = 0
    alpha: NonNegativeInt = 64
    gralora_dropout: Fraction = 0.0
    gralora_k: Divisor = 2
    init_weights: bool = True

    def check(self) -> None:
        if self.r % self.gralora_k:
            raise ValueError(f"gralora_k must divide r, got r={self.r} and gralora_k={self.gralora_k}.")


class GraloraLayer(ScaledLayer):
    """A module with a matrix of low-rank blocks added to its weight."""

    gralora_A = Slot()
    gralora_B = Slot()
    gralora_A_general = ModuleSlot[nn.Linear]()
    gralora_B_general = ModuleSlot[nn.Linear]()

    gralora_dropout = Dropout()

    def create(self, name: str, config: GraloraConfig) -> None:
        k, random = config.gralora_k, not config.init_weights
        downs, ups, rows = [], [], self.out_features // k
        for _ in range(k):
            downs.append(uniform(config.r, self.in_features // k).T)
            ups.append((uniform(rows, config.r) if random else torch.zeros(rows, config.r)).T)
        self.gralora_A[name], self.gralora_B[name] = nn.Parameter(torch.stack(downs)), nn.Parameter(torch.stack(ups))
        if config.hybrid_r:
            sizes = (self.in_features, config.hybrid_r), (config.hybrid_r, self.out_features)
            self.gralora_A_general[name], self.gralora_B_general[name] = linears(*sizes, zero=not random)

    def initial_scaling(self, name: str) -> float:
        config = self.configs[name]
        return config.alpha / (config.r + config.hybrid_r)

    def change(self, name: str) -> Iterator[Change]:
        scale, p = self.scaling[name], self.dropout_of(name)
        yield Add(Granular(self.gralora_A[name], self.gralora_B[name], scale), p)
        if name in self.gralora_A_general:
            yield LowRank(self.gralora_A_general[name].weight, self.gralora_B_general[name].weight, scale, p)


class GraloraModel(BaseTuner, layer=GraloraLayer, prefix="gralora_"):
    """A model with GraLoRA adapters."""
