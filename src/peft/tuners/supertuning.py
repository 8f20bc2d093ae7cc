"""Super-tuning: the largest entries of a weight, and a low-rank product beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import Add, Change, LowRank
from peft.core.layer import AdapterLayer
from peft.core.slots import Dropout, FixedSlot, ModuleSlot, Slot
from peft.core.tuner import BaseTuner
from peft.ops.memo import remember
from peft.ops.sparse import Entries
from peft.ops.starts import linears
from peft.registry import PeftType
from peft.values import Fraction, PositiveInt


@dataclass
class SupertuningConfig(LayerConfig, peft_type=PeftType.SUPERTUNING):
    """Super-tuning (arXiv:2607.09287): W' = W + S, where S has trained values at the largest entries of W.

    With a rank ("Supra"), W' = W + S + (lora_alpha / r) B A.

    Args:
        sparsity: share of the entries that stay as they are; S has int(in * out * (1 - sparsity)) values.
        select_top: train the entries of largest magnitude; False takes the smallest.
        r: rank of the product beside S; None for none.
        lora_alpha: numerator of its scale; 2 r if None.
        lora_dropout: probability of dropout on its input.
        init_weights: start with S and B zero, without effect; False starts at random.
        save_precomputed_indices: store which entries they are; without, they are found again in the base weight, which
            has to be the same then, bit for bit.
    """

    sparsity: Fraction = 0.99
    select_top: bool = True
    r: PositiveInt | None = None
    lora_alpha: float | None = None
    lora_dropout: Fraction = 0.0
    init_weights: bool = True
    save_precomputed_indices: bool = True

    def check(self) -> None:
        if self.r is None and self.lora_alpha is not None:
            raise ValueError(f"lora_alpha={self.lora_alpha} has no effect without a rank: set r too, or neither.")
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r


class SupertuningLayer(AdapterLayer):
    """A module with `supertuning_values` [n] added at `supertuning_indices` [n], places in its matrix row by row."""

    supertuning_values = Slot()
    supertuning_indices = FixedSlot(stored="save_precomputed_indices")
    supertuning_lora_A = ModuleSlot[nn.Linear]()
    supertuning_lora_B = ModuleSlot[nn.Linear]()

    supertuning_lora_dropout = Dropout("lora_dropout", needs="multiplies")

    def create(self, name: str, config: SupertuningConfig) -> None:
        count = values_of(self.op, config)
        self.supertuning_values[name] = nn.Parameter(torch.zeros(count) if config.init_weights else torch.randn(count))
        if config.r is None or config.lora_alpha is None:
            return
        sizes = (self.in_features, config.r), (config.r, self.out_features)
        self.supertuning_lora_A[name], self.supertuning_lora_B[name] = linears(*sizes, zero=config.init_weights)

    def draw(self, name: str, config: SupertuningConfig) -> None:
        sizes = self.original_matrix().abs().flatten()
        found = sizes.topk(values_of(self.op, config), largest=config.select_top).indices
        self.supertuning_indices[name] = found.to(torch.int32 if sizes.numel() < 2**31 else torch.int64)

    def change(self, name: str) -> Iterator[Change]:
        places, columns = self.supertuning_indices[name], self.in_features
        rows = remember(places, ("rows", columns), lambda: torch.stack((places // columns, places % columns)))
        yield Add(Entries.at(rows, self.supertuning_values[name], (self.out_features, columns)))
        if name in self.supertuning_lora_A:
            down, up = self.supertuning_lora_A[name].weight, self.supertuning_lora_B[name].weight
            config = self.configs[name]
            yield LowRank(down, up, config.lora_alpha / config.r, self.dropout_of(name))

    @classmethod
    def check(cls, config: SupertuningConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        if not values_of(op, config):
            raise ValueError(f"sparsity={config.sparsity} leaves no entry of {key!r} to be trained; choose less.")


def values_of(op: BaseOp, config: SupertuningConfig) -> int:
    """How many entries of a weight are trained."""
    return int(op.out_features * op.in_features * (1 - config.sparsity))


class SupertuningModel(BaseTuner, layer=SupertuningLayer, prefix="supertuning_"):
    """A model with super-tuning adapters."""
