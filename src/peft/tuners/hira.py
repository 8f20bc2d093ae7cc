"""Hadamard high-rank adaptation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.change import Add
from peft.core.layer import AdapterLayer
from peft.core.slots import Dropout, Slot
from peft.core.tuner import BaseTuner
from peft.ops.hadamard import Rescaled
from peft.ops.starts import uniform
from peft.registry import PeftType
from peft.values import Fraction, PositiveInt


@dataclass
class HiraConfig(LayoutConfig, peft_type=PeftType.HIRA):
    """Hadamard high-rank adaptation (openreview.net/forum?id=TwJrTz9cRS): W' = W + W * (B A), elementwise.

    A is `hira_A` [r, in] and B is `hira_B` [out, r], for convolutions [r, in, *kernel] and [out, r, 1, ...]; for
    embeddings they are `hira_embedding_A` [r, tokens] and `hira_embedding_B` [dim, r].

    Args:
        r: rank of the factor B A; the change W * (B A) has a higher one.
        hira_dropout: probability of dropout on the adapter's input; embeddings have none.
        init_weights: True starts A at random and B at zero, without effect, `"gaussian"` with a normal A; embeddings
            have A at zero. False or None starts both at random.
        rank_pattern: ranks of single modules: name or regular expression for its end -> rank.
    """

    r: PositiveInt = 32
    hira_dropout: Fraction = 0.0
    init_weights: bool | Literal["gaussian"] | None = True
    rank_pattern: dict[str, int] | None = field(default_factory=dict)

    pattern_fields: ClassVar[dict[str, str]] = {"rank_pattern": "r"}


class HiraLayer(AdapterLayer):
    """A module whose weight is multiplied, entry by entry, by one plus a low-rank matrix."""

    hira_A = Slot()
    hira_B = Slot()
    hira_embedding_A = Slot()
    hira_embedding_B = Slot()

    hira_dropout = Dropout(needs="multiplies")

    def create(self, name: str, config: HiraConfig) -> None:
        r, kernel = config.r, self.op.kernel
        a = torch.randn(r, self.in_features // math.prod(kernel), *kernel)
        b = torch.randn(self.out_features, r, *[1] * len(kernel))
        embedding = self.op.kind == "Embedding"
        if config.init_weights and embedding:
            nn.init.zeros_(a)
            nn.init.normal_(b)
        elif config.init_weights:
            a = torch.randn(a.shape) / r if config.init_weights == "gaussian" else uniform(*a.shape)
            nn.init.zeros_(b)
        slots = (self.hira_embedding_A, self.hira_embedding_B) if embedding else (self.hira_A, self.hira_B)
        slots[0][name], slots[1][name] = nn.Parameter(a), nn.Parameter(b)

    def fit(self, name: str, path: str, find: Callable[[str], Tensor | None]) -> None:
        # In files of huggingface/peft, modules that `rank_pattern` names have the rank r as all others.
        rank, found = self.configs[name].r, find("hira_A")
        found = find("hira_embedding_A") if found is None else found
        if found is None or len(found) != rank or self.r[name] == rank:
            return
        self.r[name] = rank
        for slot, dim in (("hira_A", 0), ("hira_B", 1), ("hira_embedding_A", 0), ("hira_embedding_B", 1)):
            if name in getattr(self, slot):
                shape = getattr(self, slot)[name].shape
                self.renew(slot, name, (*shape[:dim], rank, *shape[dim + 1 :]))

    def change(self, name: str) -> Add:
        if name in self.hira_embedding_A:
            a, b = self.hira_embedding_A[name], self.hira_embedding_B[name]
        else:
            a, b = self.hira_A[name].flatten(1), self.hira_B[name].flatten(1)
        return Add(Rescaled(self.original_matrix, (b, a)), dropout=self.dropout_of(name))


class HiraModel(BaseTuner, layer=HiraLayer, prefix="hira_"):
    """A model with Hadamard high-rank adapters."""
