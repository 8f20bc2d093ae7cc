"""Matrix shard sharing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.base_op import BaseOp
from peft.core.change import Add, Change, Weight
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import Dropout, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.ops.shards import Tiled, transform_shards
from peft.ops.starts import started
from peft.registry import PeftType
from peft.values import Fraction, PositiveInt


@dataclass
class MissConfig(LayerConfig, peft_type=PeftType.MISS):
    """Matrix shard sharing (arXiv:2409.15371): W' = W + (B^T B^T ... B^T), one block B [r, out] for all shards of W.

    Args:
        r: width of a shard, in columns of W.
        miss_dropout: probability of dropout on the adapter's input.
        mini_r: width of the block that `"mini"` repeats.
        init_weights: True starts B at zero; False starts it at random. `"mini"`: B itself is a block [r, mini_r] that
            is repeated. `"bat"`: W' = W + W_jk M_j + M_j for each block W_jk of r x r, with M [out / r, r, r]; there,
            `miss_dropout` has no effect.
    """

    r: PositiveInt = 64
    miss_dropout: Fraction = 0.0
    mini_r: PositiveInt = 1
    init_weights: bool | Literal["bat", "mini"] = True

    def check(self) -> None:
        if self.init_weights == "bat" and self.miss_dropout:
            warn("miss_dropout has no effect with init_weights='bat'.")

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        # Bone is what huggingface/peft called this method before.
        return {**kwargs, "bias": "miss_only"} if kwargs.get("bias") == "bone_only" else kwargs


class MissLayer(AdapterLayer):
    """A module with a block that all shards of its weight share: `miss_block`."""

    miss_block = Slot()
    label = "miss.Miss{kind}"

    miss_dropout = Dropout()
    miss_form = Setting[bool | str]("init_weights")

    def create(self, name: str, config: MissConfig) -> None:
        shapes = {"bat": (self.out_features // config.r, config.r, config.r), "mini": (config.r, config.mini_r)}
        shape = shapes.get(str(config.init_weights), (config.r, self.out_features))
        self.miss_block[name] = started(*shape, zero=config.init_weights)

    def change(self, name: str) -> Change:
        block = self.miss_block[name]
        if self.miss_form[name] == "bat":
            return Weight(lambda weight: transform_shards(weight, block))
        tile = block.repeat(1, self.out_features // block.shape[1]) if self.miss_form[name] == "mini" else block
        return Add(Tiled(tile, self.in_features), dropout=self.dropout_of(name))

    @classmethod
    def check(cls, config: MissConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        size = f"{key!r}, which is {op.in_features} wide and has {op.out_features} outputs"
        if config.r > op.in_features:
            raise ValueError(f"r={config.r} is too large for {size}.")
        if config.init_weights == "bat" and (op.in_features % config.r or op.out_features % config.r):
            raise ValueError(f"With init_weights='bat', r={config.r} must divide both sides of {size}.")
        if config.init_weights == "mini" and op.out_features % config.mini_r:
            raise ValueError(f"mini_r={config.mini_r} must divide the outputs of {size}.")


class MissMethod(Method):
    """What files of older versions are read as."""

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {key.replace(".bone_block", ".miss_block"): value for key, value in tensors.items()}


class MissModel(BaseTuner, layer=MissLayer, method=MissMethod, prefix="miss_"):
    """A model with matrix shard sharing adapters."""
