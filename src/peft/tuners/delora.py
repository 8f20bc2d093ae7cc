"""Decoupled low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.slots import Dropout, FixedSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.starts import started
from peft.registry import PeftType
from peft.values import Fraction, NonNegativeFloat, PositiveInt

#: least norm of a row of A or a column of B that is divided by
LEAST_NORM = 1e-4


@dataclass
class DeloraConfig(LayerConfig, peft_type=PeftType.DELORA):
    """Decoupled low-rank adaptation (arXiv:2503.18225): W' = W + B D A diag(n).

    D is diagonal, with lambda / (r |A_i| |B_i|) for row i of `delora_A` [r, in] and column i of `delora_B` [out, r]: so
    the trained `delora_lambda` alone says how strong the change is, and it is lambda at most (Frobenius norm), n aside.
    n [in] are the norms of the columns of W at the start, stored as `delora_w_norm`.

    Args:
        r: rank.
        delora_lambda: start value of lambda.
        module_dropout: probability of dropout on the adapter's input.
        init_weights: start B at zero, without effect; False starts it at random.
        rank_pattern: ranks of single modules: name or regular expression for its end -> rank.
        lambda_pattern: the same for delora_lambda.
    """

    r: PositiveInt = 8
    delora_lambda: NonNegativeFloat = 15
    module_dropout: Fraction = 0.0
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)

    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}


class DeloraLayer(AdapterLayer):
    """A module with a low-rank change of a norm of its own."""

    delora_A = Slot()
    delora_B = Slot()
    delora_lambda = Slot()
    delora_w_norm = FixedSlot()

    module_dropout = Dropout()

    def create(self, name: str, config: DeloraConfig) -> None:
        self.delora_A[name] = started(config.r, self.in_features)
        self.delora_B[name] = started(self.out_features, config.r, zero=config.init_weights)
        self.delora_lambda[name] = nn.Parameter(torch.full((1,), float(config.delora_lambda)))

    def draw(self, name: str, config: DeloraConfig) -> None:
        matrix = self.original_matrix()
        self.delora_w_norm[name] = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float32)

    def change(self, name: str) -> LowRank:
        a, b = self.delora_A[name], self.delora_B[name]
        norms = a.norm(dim=1).clamp(min=LEAST_NORM) * b.norm(dim=0).clamp(min=LEAST_NORM)
        strength = self.delora_lambda[name] / (self.r[name] * norms)
        # A, which is small, takes in what stands beside it: the rest is a plain product.
        down = a * strength[:, None] * self.delora_w_norm[name].to(a.dtype)
        return LowRank(down, b, dropout=self.dropout_of(name))


class DeloraModel(BaseTuner, layer=DeloraLayer, prefix="delora_"):
    """A model with DeLoRA adapters."""
