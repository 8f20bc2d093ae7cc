"""Low-rank adaptation with a handful of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.slots import Dropout, FixedSlot, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.ops.principal import principal_factors
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeFloat, PositiveInt, Share


@dataclass
class TinyLoraConfig(LayoutConfig, peft_type=PeftType.TINYLORA):
    """TinyLoRA (arXiv:2602.04118): W' = W + B R A, where R = v_1 P_1 + ... + v_u P_u is a matrix [r, r].

    B [out, r] and A [r, in] are the part of W with the r largest singular values, shared evenly between them; the P
    [u, r, r] are random. Only v [u] is trained, and layers may share it.

    Args:
        r: rank; at most the smaller side of a layer's weight.
        u: length of v.
        weight_tying: 0 gives each layer a v of its own, 1 all layers the same one; in between, neighbours share one:
            there are (1 - weight_tying) * layers of them, rounded.
        projection_seed: seed of P; each layer draws its own.
        save_projection: store P in the checkpoint; without, it is made again from the seed.
        init_v_bound: bound of the uniform start.
        tinylora_dropout: probability of dropout on the adapter's input.
        init_weights: start v at zero, without effect; "uniform" or False starts it between -init_v_bound and
            init_v_bound.
    """

    r: PositiveInt = 2
    u: PositiveInt = 64
    weight_tying: Share = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: NonNegativeFloat = 0.02
    tinylora_dropout: Fraction = 0.0
    init_weights: bool | Literal["uniform"] = True


class TinyLoraLayer(AdapterLayer):
    """A module with factors of its own weight, and a small mixed matrix between them."""

    tinylora_A = FixedSlot()
    tinylora_B = FixedSlot()
    tinylora_P = FixedSlot(stored="save_projection")
    tinylora_v = Slot(shared=True)

    #: place of the layer among those of the adapter
    tinylora_index = Setting[int]()
    tinylora_dropout = Dropout()

    def draw(self, name: str, config: TinyLoraConfig) -> None:
        matrix = self.start_matrix()
        # Files have the factors of an embedding's weight as it is held: [vectors, features].
        a, b = principal_factors(matrix.T if self.op.kind == "Embedding" else matrix, config.r, even=True)
        generator = torch.Generator().manual_seed(config.projection_seed + self.tinylora_index[name])
        p = torch.normal(0.0, 1 / len(a) ** 0.5, (config.u, len(a), len(a)), generator=generator)
        self.tinylora_A[name], self.tinylora_B[name], self.tinylora_P[name] = a.contiguous(), b.contiguous(), p

    def change(self, name: str) -> LowRank:
        v = self.shared_tensor("tinylora_v", name)
        a, b, p = (held[name].to(v) for held in (self.tinylora_A, self.tinylora_B, self.tinylora_P))
        mixed = (v @ p.flatten(1)).view(p.shape[1:])
        # What is trained is on the side of the outputs: a training step then keeps no inputs.
        down, up = (b.T, (mixed @ a).T) if self.op.kind == "Embedding" else (a, b @ mixed)
        return LowRank(down, up, dropout=self.dropout_of(name))


class TinyLoraMethod(Method):
    """What TinyLoRA shares: the vectors v, one for each group of neighbouring layers."""

    def plan_settings(self, plan: Plan, config: TinyLoraConfig) -> dict[str, dict[str, Any]]:
        count = len(plan.layers)
        groups = max(1, round(count * (1 - config.weight_tying)))
        size = count // groups
        return {
            layer.name: {"tinylora_index": index, "groups": {"tinylora_v": str(min(index // size, groups - 1))}}
            for index, layer in enumerate(plan.layers)
        }

    def share(self, plan: Plan, config: TinyLoraConfig, adapter_name: str) -> dict[str, dict[str, Tensor]]:
        groups = dict.fromkeys(place["groups"]["tinylora_v"] for place in self.planned.values())
        bound = 0.0 if config.init_weights is True else config.init_v_bound
        return {"tinylora_v": {group: torch.empty(config.u).uniform_(-bound, bound) for group in groups}}


class TinyLoraModel(BaseTuner, layer=TinyLoraLayer, method=TinyLoraMethod, prefix="tinylora_"):
    """A model with TinyLoRA adapters; `tinylora_v` holds the vectors, one for each group of an adapter's layers."""
