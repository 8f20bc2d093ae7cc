"""BD-LoRA: one of the factors is block-diagonal."""

from __future__ import annotations

import torch
from torch import nn

from peft.core.base_op import BaseOp
from peft.core.change import LowRank
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.settings import BdLoraConfig
from peft.tuners.lora.variants.base import Variant


class BdLora(Variant):
    """W' = W + s B A with A or B block-diagonal in n blocks, stored as its blocks one above the other.

    A block-diagonal A is stored as [r, in / n], a block-diagonal B as [out, r / n]. Layers that are sharded by columns
    get a block-diagonal B, those sharded by rows a block-diagonal A; then no shard needs what another computes.
    """

    label = "BD-LoRA (use_bdlora)"

    @classmethod
    def check(cls, config: LoraConfig, name: str, module: nn.Module, op: BaseOp, r: int) -> None:
        setting: BdLoraConfig = config.use_bdlora  # type: ignore[assignment]
        which = blocked(setting, name)
        if which is None and setting.match_strict:
            raise ValueError(
                f"{name!r} contains none of target_modules_bd_a={setting.target_modules_bd_a} and"
                f" target_modules_bd_b={setting.target_modules_bd_b}; add a part of its name to one of them, or set"
                " match_strict=False to give such modules a plain LoRA."
            )
        width = op.in_features if which == "lora_A" else op.out_features
        if which is not None and (r % setting.nblocks or width % setting.nblocks):
            raise ValueError(f"nblocks={setting.nblocks} must divide rank ({r}) and width ({width}) of {name!r}.")

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        which = blocked(self.setting, self.key)
        if which is not None:
            factor = getattr(layer, which)[name]
            factor.in_features //= self.setting.nblocks
            blocks = factor.weight.new_empty(factor.out_features, factor.in_features)
            factor.weight = nn.Parameter(blocks.zero_() if which == "lora_B" else nn.init.kaiming_uniform_(blocks))

    def change(self, layer: FactorLayer, name: str) -> LowRank:
        change, which = layer.low_rank(name), blocked(self.setting, self.key)
        if which == "lora_A":
            change.down = torch.block_diag(*change.down.chunk(self.setting.nblocks))
        elif which == "lora_B":
            change.up = torch.block_diag(*change.up.chunk(self.setting.nblocks))
        change.low = change.high = None
        return change


def blocked(setting: BdLoraConfig, key: str) -> str | None:
    """Which factor of the module `key` is block-diagonal: `"lora_A"`, `"lora_B"` or None.

    Raises:
        ValueError: the settings name the module for both.
    """
    a = any(part in key for part in setting.target_modules_bd_a or ())
    b = any(part in key for part in setting.target_modules_bd_b or ())
    if a and b:
        raise ValueError(f"target_modules_bd_a and target_modules_bd_b overlap: both name a part of {key!r}.")
    return "lora_A" if a else "lora_B" if b else None
