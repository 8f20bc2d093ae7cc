"""Adaptation by a small network that sees the weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import LowRank
from peft.core.scale import ScaledLayer
from peft.core.slots import ModuleSlot, Setting
from peft.core.storage.base import widened
from peft.core.tuner import BaseTuner
from peft.ops.matrix import product_with
from peft.ops.starts import linears
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
        r, out, depth = config.r, self.out_features, config.depth
        a, b, *inner = linears((out, r), (r, out), *[(r, r)] * 2 * depth, zero=config.init_weights)
        self.peanut_A[name], self.peanut_B[name] = a, b
        if depth:
            self.peanut_encoders[name] = nn.ModuleList(inner[:depth])
            self.peanut_decoders[name] = nn.ModuleList(inner[depth:])

    def change(self, name: str) -> LowRank:
        layers = (self.peanut_A, self.peanut_encoders, self.peanut_decoders)
        weights = [widened(weight) for held in layers if name in held for weight in held[name].parameters()]
        h = self.remembered(lambda: self.hidden(name, *weights), *weights)
        return LowRank(h, widened(self.peanut_B[name].weight), self.scaling[name])

    def hidden(self, name: str, a: Tensor, *inner: Tensor) -> Tensor:
        """H [r, in], of A and the weights of the encoders and decoders."""
        activation, depth = activation_of(self.act_fn[name]), self.res_num[name]
        h, before = activation(product_with(a, self.original_matrix)), []
        for encoder in inner[:depth]:
            before.append(h)
            h = activation(encoder @ h)
        for decoder in inner[depth:]:
            h = activation(decoder @ h) + before.pop()
        return h

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
