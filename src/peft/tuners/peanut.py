"""Adaptation by a small network that sees the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import LowRank
from peft.core.scale import ScaledLayer
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage.base import widened
from peft.core.tuner import BaseTuner
from peft.ops.matrix import product_with
from peft.registry import PeftType
from peft.values import NonNegativeInt, PositiveInt


@dataclass
class PeanutConfig(LayerConfig, peft_type=PeftType.PEANUT):
    """Weight-aware adaptation by a small network, PEANuT (arXiv:2410.01870): W' = W + scaling B H.

    H [r, in] is what the network makes of the weight. It begins as f(A W), for an activation f; `depth` encoders E1 ...
    make f(E H) of it, and as many decoders D1 ... make f(D H) + H', where H' is what H was before the encoder that is
    the decoder's mirror image. The tensors are `peanut_A` [r, out], `peanut_B` [out, r], `peanut_encoders` and
    `peanut_decoders` [r, r].

    Args:
        r: width of the network.
        depth: number of encoders, and of decoders.
        act_fn: f, by the name that transformers has for it.
        scaling: factor of the change.
        init_weights: start B at zero, without effect; False starts it at random as well.
    """

    r: PositiveInt = 32
    depth: NonNegativeInt = 0
    act_fn: str = "relu"
    scaling: float = 1.0
    init_weights: bool = True


class PeanutLayer(ScaledLayer):
    """A module with a change that a network makes of its weight."""

    peanut_A = ModuleSlot[nn.Linear]()
    peanut_B = ModuleSlot[nn.Linear]()
    peanut_encoders = ModuleSlot[nn.ModuleList]()
    peanut_decoders = ModuleSlot[nn.ModuleList]()

    res_num = Setting[int]("depth")
    act_fn = Setting[str]()

    def create(self, name: str, config: PeanutConfig) -> None:
        r, out = config.r, self.out_features
        a, b = nn.Linear(out, r, bias=False), nn.Linear(r, out, bias=False)
        encoders, decoders = ([nn.Linear(r, r, bias=False) for _ in range(config.depth)] for _ in range(2))
        for layer in (a, *encoders, *decoders):  # drawn anew, in the order in which huggingface/peft draws them
            layer.reset_parameters()
        nn.init.zeros_(b.weight) if config.init_weights else b.reset_parameters()
        self.peanut_A[name], self.peanut_B[name] = a, b
        if config.depth:
            self.peanut_encoders[name], self.peanut_decoders[name] = nn.ModuleList(encoders), nn.ModuleList(decoders)

    def weights(self, name: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """A, the encoders, and the decoders."""
        modules: Any = [self._modules[slot] for slot in ("peanut_A", "peanut_encoders", "peanut_decoders")]
        a, encoders, decoders = (
            [widened(p) for p in held[name].parameters()] if name in held else [] for held in modules
        )
        return a[0], encoders, decoders

    def hidden(self, name: str) -> Tensor:
        """H [r, in]."""
        a, encoders, decoders = self.weights(name)
        activation = activation_of(self.act_fn[name])
        h, before = activation(product_with(a, self.original_matrix)), []
        for encoder in encoders:
            before.append(h)
            h = activation(encoder @ h)
        for decoder in decoders:
            h = activation(decoder @ h) + before.pop()
        return h

    def change(self, name: str) -> LowRank:
        a, encoders, decoders = self.weights(name)
        h = self.remembered(lambda: self.hidden(name), a, *encoders, *decoders)
        return LowRank(h, widened(self.peanut_B[name].weight), self.scaling[name])

    @classmethod
    def check(cls, config: PeanutConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        activation_of(config.act_fn)


@lru_cache(maxsize=16)
def activation_of(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that transformers calls `name`.

    Raises:
        ValueError: there is none, or it has values of its own to train.
    """
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"act_fn={name!r} is not known; transformers has {', '.join(sorted(ACT2FN))}.")
    activation = ACT2FN[name]
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        raise ValueError(f"act_fn={name!r} has values of its own, which would not be trained; choose another one.")
    return activation


class PeanutModel(BaseTuner, layer=PeanutLayer, prefix="peanut_"):
    """A model with changes that networks make of its weights."""
