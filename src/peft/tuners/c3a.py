"""Circular convolution adaptation."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.change import Add
from peft.core.layer import AdapterLayer
from peft.core.slots import Slot
from peft.core.tuner import BaseTuner
from peft.ops.circulant import BlockCirculant
from peft.registry import PeftType
from peft.values import Fits, PositiveInt

BlockSize = Annotated[
    PositiveInt,
    Fits(
        "a block size has to be a factor of both sides", lambda b, op: op.in_features % b == op.part_features % b == 0
    ),
]
#: `init_weights` by name -> how the kernel is drawn
STARTS: dict[str, Any] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, a=5**0.5),
    "gaussian": nn.init.normal_,
}


@dataclass
class C3AConfig(LayerConfig, peft_type=PeftType.C3A):
    """Circular convolution adaptation (arXiv:2407.19342): W' = W + C / in.

    C consists of circulant blocks of size b = block_size: block (m, n) has the entry w[m, n, (j - i) mod b] at (i, j),
    for the trained `c3a_kernel` w [out / b, in / b, b]. Its rank is not bounded by the number of its values.

    Args:
        block_size: size of the blocks, which divides both sides of each weight; the larger, the fewer values.
        block_size_pattern: block sizes of single modules: name or regular expression for its end -> size.
        init_weights: how the kernel is drawn: `"xavier_uniform"`, `"kaiming_uniform"` or `"gaussian"`; True starts at
            zero, without effect, False as `"xavier_uniform"`.
    """

    block_size: BlockSize = 256
    block_size_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool | Literal["gaussian", "kaiming_uniform", "xavier_uniform"] = "xavier_uniform"

    pattern_fields: ClassVar[dict[str, str]] = {"block_size_pattern": "block_size"}


class C3ALayer(AdapterLayer):
    """A module with a matrix of circulant blocks added to its weight."""

    c3a_kernel = Slot()

    def create(self, name: str, config: C3AConfig) -> None:
        b = config.block_size
        kernel = torch.zeros(self.out_features // b, self.in_features // b, b)
        if config.init_weights is not True:
            STARTS[config.init_weights or "xavier_uniform"](kernel)
        self.c3a_kernel[name] = nn.Parameter(kernel)

    def change(self, name: str) -> Add:
        kernel = self.c3a_kernel[name]
        # There are transforms for single and double precision only.
        kernel = kernel if kernel.dtype == torch.float64 else kernel.float()
        return Add(BlockCirculant(kernel / self.in_features))


class C3AModel(BaseTuner, layer=C3ALayer, prefix="c3a_"):
    """A model with circular convolution adapters."""
