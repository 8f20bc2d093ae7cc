"""Decoupled low-rank adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import Buffers, Setting, Slot
from peft.core.targets import pattern_value
from peft.core.tuner import BaseTuner
from peft.registry import PeftType

#: least norm of a row of A or a column of B that is divided by
LEAST_NORM = 1e-4


@dataclass
class DeloraConfig(LayerConfig):
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

    r: int = 8
    delora_lambda: float = 15
    module_dropout: float = 0.0
    init_weights: bool = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)
    lambda_pattern: dict[str, float] | None = field(default_factory=dict)

    positive_fields = ("r",)
    nonnegative_fields = ("delora_lambda",)
    fraction_fields = ("module_dropout",)
    beyond_reference: ClassVar[frozenset[str]] = frozenset(("target_parameters",))
    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "lambda_pattern")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.DELORA
        self.rank_pattern, self.lambda_pattern = self.rank_pattern or {}, self.lambda_pattern or {}
        for pattern, r in self.rank_pattern.items():
            if r < 1:
                raise ValueError(f"The rank must be a positive integer, got {r} for {pattern!r} in rank_pattern.")
        for pattern, value in self.lambda_pattern.items():
            if not value >= 0:
                raise ValueError(f"lambda must not be negative, got {value} for {pattern!r} in lambda_pattern.")


class DeloraLayer(AdapterLayer):
    """A module with a low-rank change of a norm of its own."""

    slots: ClassVar[dict[str, Slot]] = {
        "delora_A": Slot(), "delora_B": Slot(), "delora_lambda": Slot(), "delora_w_norm": Slot(trained=False),
    }  # fmt: skip
    label = "delora"

    delora_A: nn.ParameterDict
    delora_B: nn.ParameterDict
    delora_lambda: nn.ParameterDict
    delora_w_norm: Buffers
    r = Setting[int]()
    module_dropout = Setting[float]()

    def create(self, name: str, config: DeloraConfig, r: int = 0, delora_lambda: float | None = None) -> None:
        r = self.r[name] = r or config.r
        self.module_dropout[name] = config.module_dropout
        start = config.delora_lambda if delora_lambda is None else delora_lambda
        a, b = torch.empty(r, self.in_features), torch.zeros(self.out_features, r)
        nn.init.kaiming_uniform_(a, a=5**0.5)
        if not config.init_weights:
            nn.init.kaiming_uniform_(b, a=5**0.5)
        self.delora_A[name], self.delora_B[name] = nn.Parameter(a), nn.Parameter(b)
        self.delora_lambda[name] = nn.Parameter(torch.full((1,), float(start)))

    def draw(self, name: str, config: DeloraConfig) -> None:
        matrix = self.op.matrix(self.original_weight().detach())
        self.delora_w_norm[name] = torch.linalg.vector_norm(matrix, dim=0, dtype=torch.float32)

    def change(self, name: str) -> LowRank:
        a, b = self.delora_A[name], self.delora_B[name]
        norms = a.norm(dim=1).clamp(min=LEAST_NORM) * b.norm(dim=0).clamp(min=LEAST_NORM)
        strength = self.delora_lambda[name] / (self.r[name] * norms)
        # A, which is small, takes in what stands beside it: the rest is a plain product.
        down = a * strength[:, None] * self.delora_w_norm[name].to(a.dtype)
        return LowRank(down, b, dropout=self.module_dropout[name] if self.training else 0.0)

    @classmethod
    def check(cls, config: DeloraConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        if config.module_dropout and not op.linear:
            raise ValueError(f"module_dropout needs linear layers; {key!r} is a {op.kind}.")


class DeloraMethod(Method):
    """The rank and the start of lambda of each module."""

    def layer_settings(self, config: DeloraConfig, key: str) -> dict[str, Any]:
        return {
            "r": pattern_value(config.rank_pattern or {}, key, config.r),
            "delora_lambda": pattern_value(config.lambda_pattern or {}, key, config.delora_lambda),
        }


class DeloraModel(BaseTuner):
    """A model with DeLoRA adapters."""

    prefix = "delora_"
    layer_class = DeloraLayer
    method_class = DeloraMethod
