"""Additive adapters with a rank and a scale, which may differ by module, and dropout of rows or whole modules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import ConvOp, kernel_numel
from peft.core.change import Add, Change
from peft.core.layer import AdapterLayer
from peft.core.slots import Setting
from peft.ops.matrix import Matrix


@dataclass
class ScaledConfig(LayerConfig):
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

    r: int = 8
    alpha: float = 8
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    alpha_pattern: dict[str, float] | None = field(default_factory=dict)
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    positive_fields = ("r",)
    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    nonnegative_fields = ("alpha",)
    fraction_fields = ("rank_dropout", "module_dropout")
    beyond_reference: ClassVar[frozenset[str]] = frozenset(("target_parameters", "bias"))


def started(*shape: int, zero: bool | str = False) -> nn.Parameter:
    """A parameter at its start: at random as a linear layer's weight, or zero."""
    return nn.Parameter(torch.zeros(shape) if zero else nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5))


class ScaledLayer(AdapterLayer):
    """A module with adapters `scaling` times some change of the weight.

    A method writes `create`, which calls the one here first, and `matrix`.
    """

    r = Setting[int]()
    alpha = Setting[float]()
    scaling = Setting[float]()
    rank_dropout = Setting[float]()
    rank_dropout_scale = Setting[bool]()
    module_dropout = Setting[float]()

    def create(self, name: str, config: Any, r: int = 0, alpha: float | None = None) -> None:
        self.r[name] = r or config.r
        self.alpha[name] = config.alpha if alpha is None else alpha
        self.scaling[name] = self.alpha[name] / self.r[name]
        self.rank_dropout_scale[name] = getattr(config, "rank_dropout_scale", True)

    def effective_kernel(self, config: Any) -> tuple[int, ...]:
        """Sizes of the kernel that is decomposed; empty where the weight is decomposed as a matrix."""
        base = self.get_base_layer()
        if not config.use_effective_conv2d or not isinstance(self.op, ConvOp) or kernel_numel(base) == 1:
            return ()
        kernel: tuple[int, ...] = base.kernel_size
        return (*kernel, 1) if len(kernel) == 1 else kernel  # as the files of one-dimensional ones have it

    # ---- scale

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets the scale of an adapter to `scale` times what its configuration says."""
        if self.has(adapter):
            self.scaling[adapter] = scale * self.initial_scaling(adapter)

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of the active adapters."""
        for name in self.live():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divides the scale of the active adapters; without `scale`, sets it to what the configuration says."""
        for name in self.live():
            self.scaling[name] = self.initial_scaling(name) if scale is None else self.scaling[name] / scale

    def initial_scaling(self, name: str) -> float:
        """The scale of an adapter as its configuration says."""
        return self.alpha[name] / self.r[name]

    # ---- what an adapter does

    def matrix(self, name: str) -> Matrix:
        """What adapter `name` adds to the weight, scaled."""
        raise NotImplementedError

    def change(self, name: str) -> tuple[Change, ...]:
        return () if self.skips(name) else (Add(self.matrix(name), factors=self.kept_rows(name)),)

    def skips(self, name: str) -> bool:
        """Whether the module runs without adapter `name` this time."""
        p = self.module_dropout[name]
        return self.training and p > 0 and torch.rand(1).item() <= p

    def kept_rows(self, name: str) -> Tensor | None:
        """What the rows of the change are multiplied with in training: [out]; None for ones."""
        p = self.rank_dropout[name]
        if not self.training or p == 0:
            return None
        kept = (torch.rand(self.out_features, device=self.scaling_device(name)) > p).float()
        return kept / kept.mean().clamp(min=1 / self.out_features) if self.rank_dropout_scale[name] else kept

    def scaling_device(self, name: str) -> torch.device:
        """Where the adapter's tensors are."""
        return next(iter(self.adapter_parameters(name))).device
