"""Householder reflection adaptation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from peft.config import LayerConfig
from peft.core.change import OnInput
from peft.core.layer import AdapterLayer
from peft.core.slots import Setting, Slot
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.ops.householder import reflection_factors
from peft.ops.starts import uniform
from peft.registry import PeftType
from peft.values import PositiveInt


@dataclass
class HRAConfig(LayerConfig, peft_type=PeftType.HRA):
    """Householder reflection adaptation (arXiv:2405.17484).

    W' = W (I - 2 u1 u1^T) ... (I - 2 ur ur^T), with u1 ... ur the normalised columns of `hra_u` [in, r].

    Args:
        r: number of reflections; if it is odd, they start at random.
        apply_GS: make the reflections orthogonal to each other (Gram-Schmidt).
        init_weights: start with pairs of equal reflections, which cancel; False starts at random.
    """

    r: PositiveInt = 8
    apply_GS: bool = False
    init_weights: bool = True

    def check(self) -> None:
        if self.init_weights and self.r % 2 and not self.inference_mode:
            warn(f"HRA starts without effect only with an even number of reflections; r={self.r} starts at random.")


class HRALayer(AdapterLayer):
    """A module whose weight is multiplied by reflections."""

    hra_u = Slot()

    hra_r = Setting[int]("r")
    hra_apply_GS = Setting[bool]("apply_GS")

    def create(self, name: str, config: HRAConfig) -> None:
        pairs = config.init_weights and config.r % 2 == 0
        u = uniform(self.in_features, config.r // 2 if pairs else config.r)
        self.hra_u[name] = nn.Parameter(u.repeat_interleave(2, dim=1) if pairs else u)

    def change(self, name: str) -> OnInput:
        left, right = reflection_factors(self.hra_u[name], self.hra_apply_GS[name])
        return OnInput(
            lambda x: x + (x @ right.to(x.dtype)) @ left.to(x.dtype).T,
            lambda weight: weight + (weight @ left) @ right.T,
            thin=(left, right),
        )


class HRAModel(BaseTuner, layer=HRALayer, prefix="hra_"):
    """A model with Householder reflection adapters."""
