"""Bias-efficient fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from peft.config import LayerConfig
from peft.core.change import Bias
from peft.core.layer import AdapterLayer
from peft.core.slots import Slot
from peft.core.tuner import BaseTuner
from peft.errors import warn
from peft.registry import PeftType


@dataclass
class BeftConfig(LayerConfig, peft_type=PeftType.BEFT):
    """Bias-efficient fine-tuning (arXiv:2509.15974): y = W x + b + `beft_bias`, with a trained vector [1, out].

    By default the value projections are the targets. A module without bias gets one as long as the adapter is there;
    there is no place to merge it into.

    Args:
        init_weights: start at zero, without effect; False starts at random.
    """

    init_weights: bool = True


class BeftLayer(AdapterLayer):
    """A module with a vector added to its output; not an embedding or a bare parameter, where biases are none."""

    beft_bias = Slot()
    kinds = AdapterLayer.kinds - {"Embedding", "Parameter"}

    def create(self, name: str, config: BeftConfig) -> None:
        if self.get_base_bias() is None:
            warn(f"A {self.op.kind} has no bias that adapter {name!r} could be merged into.")
        shape = 1, self.out_features
        self.beft_bias[name] = nn.Parameter(torch.zeros(shape) if config.init_weights else torch.randn(shape))

    def change(self, name: str) -> Bias:
        return Bias(self.beft_bias[name].flatten())

    def check_merge(self, name: str) -> None:
        if self.get_base_bias() is None:
            raise ValueError(
                f"Adapter {name!r} adds to the bias, and there is a {self.op.kind} without bias that it cannot be"
                " merged into. Keep the adapter, or leave such modules out of target_modules."
            )


class BeftModel(BaseTuner, layer=BeftLayer, prefix="beft_"):
    """A model with trained vectors added to the outputs of its modules."""
