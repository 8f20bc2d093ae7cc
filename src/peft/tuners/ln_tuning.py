"""Tuning of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from peft.config import LayerConfig
from peft.core.base_op import NormOp
from peft.core.change import Add, Bias, Change, Statistics
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import ModuleSlot
from peft.core.storage import onloaded
from peft.core.tuner import BaseTuner
from peft.ops.matrix import Dense
from peft.registry import PeftType


@dataclass
class LNTuningConfig(LayerConfig, peft_type=PeftType.LN_TUNING):
    """Tuning of normalisation layers (arXiv:2312.11420): each adapter trains a copy of a module's weight and bias.

    Several active adapters on one module add up what they have changed. On batch normalisation an adapter has
    statistics of its own too, which begin as the module's: training with it brings these up to date, not the module's.
    There one adapter at a time can be active, and of several that are merged the last one's statistics count.
    """


class LNTuningLayer(AdapterLayer):
    """A module whose weight and bias are exchanged for trained ones, and its statistics if it gathers some.

    It works on every kind of module that has one weight, but is meant for normalisation.
    """

    ln_tuning_layers = ModuleSlot[nn.ParameterDict]()
    kinds = AdapterLayer.kinds | {"LayerNorm"}
    label = "ln_tuning.{name}"

    def create(self, name: str, config: LNTuningConfig) -> None:
        with onloaded(self.get_base_layer()):
            copies = {self.op.weight_name: self.get_base_weight(), self.op.bias_name: self.get_base_bias()}
            held = nn.ParameterDict({key: value.detach().clone() for key, value in copies.items() if value is not None})
            for key in self.statistics():
                held.register_buffer(key, self._original(key).detach().clone())
        self.ln_tuning_layers[name] = held

    def statistics(self) -> list[str]:
        """What the module gathers in training, by name."""
        base = self.get_base_layer()
        kept = base._buffers if isinstance(self.op, NormOp) else {}
        return [key for key, value in kept.items() if value is not None and key not in base._non_persistent_buffers_set]

    def check_active(self, names: Sequence[str]) -> None:
        here = [name for name in names if self.has(name)]
        if len(here) > 1 and self.statistics():
            raise ValueError(f"{', '.join(here)} have statistics of their own here; one at a time can be active.")

    def change(self, name: str) -> Iterator[Change]:
        copies = self.ln_tuning_layers[name]
        weight, bias = self.original_weight().detach(), self.original_bias()
        yield Add(Dense(self.op.matrix(copies[self.op.weight_name] - weight)))
        if bias is not None and self.op.bias_name:
            yield Bias(copies[self.op.bias_name] - bias.detach())
        if copies._buffers:
            yield Statistics(dict(copies.named_buffers()))


class LNTuningMethod(Method):
    """LN tuning leaves the wrappers of modules that are trained in full where they are, as huggingface/peft does."""

    unwraps_saved = False


class LNTuningModel(BaseTuner, layer=LNTuningLayer, method=LNTuningMethod, prefix="ln_tuning_"):
    """A model with trained copies of its normalisation layers."""
