"""Vector-based random matrix adaptation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.slots import Dropout, FixedSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.random_bases import draw_projections
from peft.registry import PeftType
from peft.values import Fraction, PositiveInt


@dataclass
class VeraConfig(LayoutConfig, peft_type=PeftType.VERA):
    """Vector-based random matrix adaptation (arXiv:2310.11454): W' = W + diag(b) B diag(d) A.

    A [r, in] and B [out, r] are random, frozen and shared by all layers, cut to the size that each needs; the vectors
    d [r] and b [out] are trained.

    Args:
        r: rank of the shared projections.
        projection_prng_key: seed of the projections.
        save_projection: store them in the checkpoint; without, they are made again from the seed.
        vera_dropout: probability of dropout on the adapter's input.
        d_initial: start value of d.
        init_weights: start b at zero, without effect; False starts it at one, and d at random.
    """

    r: PositiveInt = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: Fraction = 0.0
    d_initial: float = 0.1
    init_weights: bool = True


class VeraLayer(AdapterLayer):
    """A module with vectors that scale the shared projections."""

    vera_lambda_b = Slot()
    vera_lambda_d = Slot()
    vera_A = FixedSlot(shared=True, stored="save_projection")
    vera_B = FixedSlot(shared=True, stored="save_projection")

    vera_dropout = Dropout()

    def create(self, name: str, config: VeraConfig) -> None:
        if config.init_weights:
            d, b = torch.full((config.r,), float(config.d_initial)), torch.zeros(self.out_features)
        else:
            d, b = torch.randn(config.r), torch.ones(self.out_features)
        self.vera_lambda_d[name], self.vera_lambda_b[name] = nn.Parameter(d), nn.Parameter(b)

    def change(self, name: str) -> LowRank:
        b, d = self.vera_lambda_b[name], self.vera_lambda_d[name]
        down, up = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
        return LowRank(down.to(b), up.to(b), dropout=self.dropout_of(name), middle=d, factors=b)


class VeraMethod(Method):
    """What VeRA shares: the projections, as large as the largest of its layers."""

    common_fields = ("projection_prng_key", "save_projection")

    def share(self, plan: Plan, config: VeraConfig, adapter_name: str) -> dict[str, Tensor]:
        rows, columns = plan.largest
        a, b = draw_projections((config.r, columns), (rows, config.r), seed=config.projection_prng_key)
        return {"vera_A": a, "vera_B": b}


class VeraModel(BaseTuner, layer=VeraLayer, method=VeraMethod, prefix="vera_lambda_"):
    """A model with VeRA adapters; `vera_A` and `vera_B` hold the projections that an adapter's layers share."""
