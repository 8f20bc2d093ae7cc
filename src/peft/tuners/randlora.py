"""Full-rank adaptation by scaled random bases."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import LowRank
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.scale import ScaledLayer
from peft.core.slots import Dropout, FixedSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.random_bases import draw_bases
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeFloat, PositiveInt


@dataclass
class RandLoraConfig(LayoutConfig, peft_type=PeftType.RANDLORA):
    """RandLoRA (arXiv:2502.00987): W' = W + randlora_alpha / r * M N, a matrix of full rank.

    With n = ceil(min(in, out) / r): M [max(in, out), n r] are the random bases B, N [n r, min(in, out)] is the random
    A [r, min(in, out)], n times over, with its entries scaled by the trained `randlora_lambda` [r, n] and
    `randlora_gamma` [n, min(in, out)]. (M N)^T takes the place of M N where out < in. A and B are frozen and shared by
    all layers, cut to the size that each needs.

    Args:
        r: rank of a basis; the smaller it is, the more is trained.
        projection_prng_key: seed of the bases.
        save_projection: store them in the checkpoint; without, they are made again from the seed, which means other
            values in versions of torch that draw bfloat16 otherwise (2.4 and 2.13 differ).
        sparse: bases of 0, 1 and -1, a third of them not 0.
        very_sparse: one in sqrt(min(in, out)) not 0.
        randlora_dropout: probability of dropout on the adapter's input.
        randlora_alpha: numerator of the scale.
        init_weights: start lambda at zero, without effect; False starts it at random.
    """

    r: PositiveInt = 32
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: Fraction = 0.0
    randlora_alpha: NonNegativeFloat = 640
    init_weights: bool = True


class RandLoraLayer(ScaledLayer):
    """A module with scales for the shared bases."""

    randlora_lambda = Slot()
    randlora_gamma = Slot()
    randlora_A = FixedSlot(shared=True, stored="save_projection")
    randlora_B = FixedSlot(shared=True, stored="save_projection")

    randlora_dropout = Dropout()

    def create(self, name: str, config: RandLoraConfig) -> None:
        narrow, wide = sorted((self.in_features, self.out_features))
        count = math.ceil(narrow / config.r)
        start, spread = (torch.zeros, max(count, narrow)) if config.init_weights else (torch.randn, wide)
        self.randlora_lambda[name] = nn.Parameter(start(config.r, count))
        self.randlora_gamma[name] = nn.Parameter(torch.full((count, narrow), 1 / spread))

    def initial_scaling(self, name: str) -> float:
        return self.configs[name].randlora_alpha / self.r[name]

    def key_map(self, name: str) -> dict[str, str]:
        keys = super().key_map(name)
        if keys and self.slots["randlora_A"].is_stored(self.configs[name], "randlora_A"):
            keys.update({slot: f"{slot}.{name}" for slot in ("randlora_A", "randlora_B")})
        return keys

    def change(self, name: str) -> LowRank:
        scale, gamma = self.randlora_lambda[name] * self.scaling[name], self.randlora_gamma[name]
        a, b = (shared[name].to(scale) for shared in (self.randlora_A, self.randlora_B))
        (count, narrow), wide = gamma.shape, max(self.in_features, self.out_features)
        # Product of the scales first: for their gradients, only they themselves have to be kept.
        n = (a[:, :, :narrow] * (scale.unsqueeze(-1) * gamma)).flatten(0, 1)
        m = b[:wide, :count].flatten(1)
        down, up = (n, m) if self.in_features <= self.out_features else (m.T, n.T)
        return LowRank(down, up, dropout=self.dropout_of(name))


class RandLoraMethod(Method):
    """What RandLoRA shares: the bases, as large as the largest of its layers."""

    common_fields = ("projection_prng_key", "save_projection")

    def share(self, plan: Plan, config: RandLoraConfig, adapter_name: str) -> dict[str, Tensor]:
        narrow, wide = sorted(plan.largest)
        sparsity = math.sqrt(narrow) if config.very_sparse else 3 if config.sparse else None
        a, b = draw_bases(config.r, narrow, wide, config.projection_prng_key, sparsity)
        return {"randlora_A": a, "randlora_B": b}


class RandLoraModel(BaseTuner, layer=RandLoraLayer, method=RandLoraMethod, prefix="randlora_"):
    """A model with RandLoRA adapters; `randlora_A` and `randlora_B` hold the bases that an adapter's layers share."""
