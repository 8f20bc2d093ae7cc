"""Sparse high rank adaptation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft.config import LayoutConfig
from peft.core.base_op import BaseOp
from peft.core.change import Add
from peft.core.scale import ScaledLayer
from peft.core.slots import FixedSlot, Slot
from peft.core.storage import onloaded
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.ops.memo import remember
from peft.ops.sparse import Entries, draw_places, in_row_order
from peft.registry import PeftType
from peft.values import PositiveInt

#: takes a base module and r; gives ones and zeros in the shape of the module's weight
MaskFunction = Callable[..., Tensor]


@dataclass
class ShiraConfig(LayoutConfig, peft_type=PeftType.SHIRA):
    """Sparse high rank adaptation (arXiv:2406.13175): W' = W + S, with r (in + out) entries of S trained.

    Where these are is stored with the adapter. A function of one's own chooses them if it is set as `config.mask_fn`
    before the adapter is made: `mask_fn(base_layer, r)` returns a mask of ones and zeros in the shape of the layer's
    weight, with r (in + out) ones.

    Args:
        r: an adapter has as many values as one of LoRA of this rank.
        mask_type: `"random"`, or any other name for a mask function of one's own.
        random_seed: seed of the random choice.
        init_weights: start with zeros, without effect; False starts at random.
    """

    r: PositiveInt = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    def check(self) -> None:
        self.mask_fn: MaskFunction | None = None
        if self.mask_type != "random" and not self.inference_mode:
            warn(f"mask_type={self.mask_type!r} is not known here; set config.mask_fn to a function of your own.")


class ShiraLayer(ScaledLayer):
    """A module with single entries of its weight changed: by `shira_weight` [n] at `shira_indices` [2, n]."""

    shira_weight = Slot()
    shira_indices = FixedSlot()

    def create(self, name: str, config: ShiraConfig) -> None:
        count = config.r * (self.in_features + self.out_features)
        self.shira_weight[name] = nn.Parameter(torch.zeros(count) if config.init_weights else torch.randn(count))

    def draw(self, name: str, config: ShiraConfig) -> None:
        count = self.shira_weight[name].numel()
        if self.waits_for_file:
            positions = torch.empty(2, count, dtype=torch.int32, device="meta")
        elif config.mask_fn is not None:
            with onloaded(self.get_base_layer()):
                mask = config.mask_fn(self.get_base_layer(), config.r)
            positions = self.op.matrix(mask).nonzero().T.int().contiguous()
            if (ones := positions.shape[1]) != count:
                raise ValueError(f"mask_fn of {name!r} must return r (in + out) = {count} ones, got {ones}.")
        elif config.mask_type == "random":
            drawn = in_row_order(draw_places(self.out_features, self.in_features, count, config.random_seed))[1]
            positions = drawn.clone()  # which a file may overwrite
        else:  # a file may say where they are
            positions = torch.full((2, count), -1, dtype=torch.int32)
        self.shira_indices[name] = positions

    def change(self, name: str) -> Add:
        positions = self.shira_indices[name]
        if not torch.compiler.is_compiling():
            remember(positions, "placed", lambda: _check_placed(positions, name))
        values = self.scaling[name] * self.shira_weight[name]
        return Add(Entries(positions, values, (self.out_features, self.in_features)))

    def fit(self, name: str, path: str, find: Callable[[str], Tensor | None]) -> None:
        positions = find("shira_indices")
        if positions is None or positions.ndim != 2 or positions.shape[0] != 2 or not positions.numel():
            return
        least, most = positions.amin(1).tolist(), positions.amax(1).tolist()
        if min(least) < 0 or most[0] >= self.out_features or most[1] >= self.in_features:
            raise ValueError(
                f"{path}.shira_indices names rows {least[0]} to {most[0]}, columns {least[1]} to {most[1]} of a"
                f" weight [{self.out_features}, {self.in_features}]."
            )

    @classmethod
    def check(cls, config: ShiraConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        count, total = config.r * (op.in_features + op.out_features), op.in_features * op.out_features
        if count > total:
            raise ValueError(f"r={config.r} asks for {count} values on {key!r}, more than the {total} of its weight.")


def _check_placed(positions: Tensor, name: str) -> None:
    if positions.shape[1] and int(positions[0, 0]) < 0:
        raise ValueError(f"Adapter {name!r} lacks its entries: set config.mask_fn before making it, or load a file.")


class ShiraModel(BaseTuner, layer=ShiraLayer, prefix="shira_"):
    """A model with sparse high rank adapters."""
