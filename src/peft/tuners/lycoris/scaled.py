"""Additive adapters with a rank and a scale, which may differ by module, and dropout of rows or whole modules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from peft.config import LayerConfig
from peft.core.change import Add, Change
from peft.core.scale import ScaledLayer
from peft.core.slots import Setting
from peft.ops.matrix import Matrix
from peft.values import Fraction, NonNegativeFloat, PositiveInt


@dataclass
class LycorisConfig(LayerConfig):
    """What configurations of adapters with a rank and a scale alpha / r share.

    Args:
        r: rank.
        alpha: numerator of the scale.
        rank_pattern: ranks of single modules: name or regular expression for its end -> rank.
        alpha_pattern: the same for alpha.
        rank_dropout: probability, in training, that a row of the change is left out.
        module_dropout: probability, in training, that a module runs without its adapter.
        use_effective_conv2d: decompose convolutions of kernels larger than 1 along the kernel as well.
        init_weights: start without effect; False starts at random.
    """

    r: PositiveInt = 8
    alpha: NonNegativeFloat = 8
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    rank_dropout: Fraction = 0.0
    module_dropout: Fraction = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool = True

    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}


class LycorisLayer(ScaledLayer):
    """A module with adapters `scaling` times some change of the weight.

    A method writes `create` and `matrix`.
    """

    alpha = Setting[float]()
    rank_dropout = Setting[float]()
    rank_dropout_scale = Setting[bool]()
    module_dropout = Setting[float]()

    def effective_kernel(self, config: Any) -> tuple[int, ...]:
        """Sizes of the kernel that is decomposed; empty where the weight is decomposed as a matrix."""
        kernel = self.op.kernel
        if not config.use_effective_conv2d or math.prod(kernel) == 1:
            return ()
        return (*kernel, 1) if len(kernel) == 1 else kernel  # as the files of one-dimensional ones have it

    def initial_scaling(self, name: str) -> float:
        return self.alpha[name] / self.r[name]

    def matrix(self, name: str) -> Matrix:
        """What adapter `name` adds to the weight, scaled."""
        raise NotImplementedError

    def change(self, name: str) -> tuple[Change, ...]:
        p = self.module_dropout[name]
        if self.training and p > 0 and torch.rand(1).item() <= p:
            return ()  # the module runs without the adapter this time
        return (Add(self.matrix(name), factors=self.kept_rows(name)),)

    def kept_rows(self, name: str) -> Tensor | None:
        """What the rows of the change are multiplied with in training: [out]; None for ones."""
        p = self.rank_dropout[name]
        if not self.training or p == 0:
            return None
        device = next(iter(self.adapter_parameters(name))).device
        kept = (torch.rand(self.out_features, device=device) > p).float()
        is_scaled = self.rank_dropout_scale.get(name, True)
        return kept / kept.mean().clamp(min=1 / self.out_features) if is_scaled else kept
