"""VeLoRA: less is kept of the input for the gradient of A."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from peft.core.change import LowRank
from peft.core.slots import FixedSlot, Slot
from peft.ops.velora import compressed_linear, group_width, mean_direction, unit
from peft.tuners.lora.base import FactorLayer
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.variants.base import Variant


class Velora(Variant):
    """LoRA whose gradient of A comes from inputs that are kept compressed (arXiv:2405.17991).

    Groups of the input's features are kept as their lengths along one direction, stored as `lora_velora_embed`.
    """

    label = "VeLoRA (velora_config)"
    slots: ClassVar[dict[str, Slot]] = {"lora_velora_embed": FixedSlot()}

    #: whether there is a direction yet
    _found = False

    def create(self, layer: FactorLayer, name: str, config: LoraConfig) -> None:
        a, _ = layer.factors(name)
        direction = torch.zeros(group_width(layer.in_features, self.setting.num_groups), device=a.device)
        if self.setting.init_type == "random":
            direction, self._found = unit(torch.randn_like(direction)), True
        layer.lora_velora_embed[name] = direction.to(a.dtype)

    def change(self, layer: FactorLayer, name: str) -> LowRank:
        change = layer.low_rank(name)
        if layer.training and torch.is_grad_enabled():
            change.low, change.high = (lambda x: self._compressed(layer, name, x)), None
        return change

    def _compressed(self, layer: FactorLayer, name: str, x: Tensor) -> Tensor:
        """A x, with x kept compressed for the gradient."""
        self._found = self._found or bool(layer.lora_velora_embed[name].any())  # it may have come from a file
        if not self._found or self.setting.init_type == "batch_average":
            with torch.no_grad():
                direction = mean_direction(x, self.setting.num_groups)
                layer.lora_velora_embed[name] = direction.to(layer.lora_velora_embed[name])
            self._found = True
        a, _ = layer.factors(name)
        direction = layer.lora_velora_embed[name]
        return compressed_linear(x, a.to(x.dtype), direction, self.setting.num_groups, self.setting.scale)
