"""2D rotary adaptation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.change import OnOutput
from peft.core.layer import AdapterLayer
from peft.core.slots import Setting, Slot
from peft.core.tuner import BaseTuner
from peft.registry import PeftType
from peft.values import Fits, Range

RoadVariant = Literal["road_1", "road_2", "road_4"]
GroupSize = Annotated[
    int,
    Range("must be a positive even number", lambda size: size > 0 and size % 2 == 0),
    Fits("the outputs have to be divisible by it", lambda size, op: op.part_features % size == 0),
]
#: variant -> angles (and as many scales) for each pair of outputs
ANGLES: dict[str, int] = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass
class RoadConfig(LayerConfig, peft_type=PeftType.ROAD):
    """2D rotary adaptation, RoAd (arXiv:2409.00119): pairs of outputs are rotated and scaled.

    In each group of outputs, the pair (a, b) of the i-th output of the first half and that of the second becomes
    (c a - s b, c' b + s' a), with c = alpha cos(theta) and s = alpha sin(theta) for the trained `road_alpha` and
    `road_theta`. The bias is rotated too.

    Args:
        variant: `"road_1"` has one angle and scale for each pair; `"road_2"` one for c and s and one for c' and s';
            `"road_4"` one for each of the four.
        group_size: outputs in a group, an even number that divides those of each module. It makes no difference to
            what can be learned.
        init_weights: start at angle 0 and scale 1, without effect; False starts around these at random.
    """

    variant: RoadVariant = "road_1"
    group_size: GroupSize = 64
    init_weights: bool = True


class RoadLayer(AdapterLayer):
    """A module whose outputs are rotated in pairs."""

    road_theta = Slot()
    road_alpha = Slot()

    variant = Setting[str]()
    group_size = Setting[int]()

    def create(self, name: str, config: RoadConfig) -> None:
        count = self.out_features // 2 * ANGLES[config.variant]
        theta, alpha = torch.zeros(count), torch.ones(count)
        if not config.init_weights:
            theta, alpha = theta.normal_(0, 0.5), alpha.normal_(1, 0.5)
        self.road_theta[name], self.road_alpha[name] = nn.Parameter(theta), nn.Parameter(alpha)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """c with c', and s with s': [groups, 2, group_size / 2], or [groups, 1, group_size / 2] where c' is c."""
        shape = -1, ANGLES[self.variant[name]], self.group_size[name] // 2
        theta, alpha = self.road_theta[name].view(shape), self.road_alpha[name].view(shape)
        # Those for c come first; the first and the last two are the same where there are no more.
        return alpha[:, :2] * theta[:, :2].cos(), alpha[:, -2:] * theta[:, -2:].sin()

    def change(self, name: str) -> OnOutput:
        straight, across = self.factors(name)

        def rotate(y: Tensor) -> Tensor:
            # In the dtype of the adapter: in half precision, small angles would be rounded away.
            a, b = y.unflatten(-1, (len(straight), 2, -1)).unbind(-2)
            pairs = a * straight[:, 0] - b * across[:, 0], b * straight[:, -1] + a * across[:, -1]
            return torch.stack(pairs, dim=-2).flatten(-3).to(y.dtype)

        return OnOutput(rotate)


class RoadModel(BaseTuner, layer=RoadLayer, prefix="road_"):
    """A model with rotations of the outputs of its modules."""
