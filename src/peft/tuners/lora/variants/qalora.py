"""QA-LoRA: the adapter sees the input in the groups that the base weight is quantised in."""

from __future__ import annotations

from torch import nn

from peft.core.base_op import BaseOp
from peft.core.change import LowRank
from peft.core.layer import AdapterLayer
from peft.core.storage import storage_of
from peft.errors import warn
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.variants.base import Variant


class Qalora(Variant):
    """y = x W^T + s (n pool(x) A^T) B^T, with the mean of each of n groups of features in pool(x) (arXiv:2309.14717).

    A is [r, n]. All features of a group get the same change, which the group's zero point can take up. On modules that
    are not quantised by groups (GPTQ), the adapter is a plain LoRA, and a warning says so.
    """

    label = "QA-LoRA (use_qalora)"
    kinds = AdapterLayer.kinds

    @classmethod
    def check(cls, config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
        if not by_groups(module, op):
            warn("use_qalora is for layers that GPTQ has quantised; those that are none get a plain LoRA.")
        elif op.in_features % (width := config.qalora_group_size):
            raise ValueError(f"qalora_group_size={width} must divide the {op.in_features} input features of {name!r}.")

    def applies(self, layer: FactorLayer) -> bool:
        return by_groups(layer.get_base_layer(), layer.op)

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        self.width = config.qalora_group_size
        layer.lora_A[name] = nn.Linear(layer.in_features // self.width, layer.r[name], bias=False)

    def change(self, layer: FactorLayer, name: str) -> LowRank:
        change = layer.low_rank(name)
        groups = change.down.shape[1]
        change.down = (change.down * (groups / self.width)).repeat_interleave(self.width, dim=1)
        change.low = change.high = None
        return change


def by_groups(module: nn.Module, op: BaseOp) -> bool:
    """Whether a module holds its weight as GPTQ does: packed, with zero points by group."""
    return storage_of(module, op.weight_name).backend == "gptq"
