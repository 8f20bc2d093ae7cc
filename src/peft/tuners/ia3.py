"""(IA)^3: scaling of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft.config import LayoutConfig
from peft.core.change import ScaleInput, ScaleOutput
from peft.core.combine import (
    add_combined,
    check_combination,
    combined_config,
    exact_targets,
    joined_targets,
    layers_with,
)
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import Setting, Slot
from peft.core.targets import ends_with, matching_entry
from peft.core.tuner import BaseTuner
from peft.ops.merging import task_arithmetic
from peft.registry import PeftType
from peft.target_tables import FEEDFORWARD_TARGETS


@dataclass
class IA3Config(LayoutConfig, peft_type=PeftType.IA3):
    """Infused adapter by inhibiting and amplifying inner activations (arXiv:2205.05638).

    The output of a module is multiplied by the vector `ia3_l` [out, 1]; for feed-forward modules its input is, and the
    vector is [1, in].

    Args:
        feedforward_modules: those of `target_modules` whose input is scaled; if None, those usual for the model type.
        init_ia3_weights: start at one, without effect; False starts at random.
    """

    feedforward_modules: list[str] | set[str] | str | None = None
    init_ia3_weights: bool = True

    def check(self) -> None:
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            outside = self.feedforward_modules - self.target_modules
            if outside:
                raise ValueError(f"feedforward_modules must be among target_modules; {sorted(outside)} is not.")


class IA3Layer(AdapterLayer):
    """A module whose output or input is scaled."""

    ia3_l = Slot()
    label = "{kind}"

    #: adapter -> whether it scales the input
    scales_input = Setting[bool]()

    @property
    def is_feedforward(self) -> bool:
        """Whether the first adapter here scales the input."""
        return next(iter(self.scales_input.values()), False)

    def create(self, name: str, config: IA3Config, is_feedforward: bool = False) -> None:
        self.scales_input[name] = is_feedforward
        size = self.op.input_size(self.get_base_layer()) if is_feedforward else self.out_features
        shape = (1, size, *[1] * len(self.op.kernel)) if self.op.kernel or is_feedforward else (size, 1)
        start = torch.ones(shape) if config.init_ia3_weights else torch.randn(shape)
        self.ia3_l[name] = nn.Parameter(start)

    def change(self, name: str) -> ScaleInput | ScaleOutput:
        scale = self.ia3_l[name].flatten()
        return ScaleInput(scale) if self.scales_input[name] else ScaleOutput(scale)


class IA3Method(Method):
    """Which modules have their input scaled; sums of adapters."""

    def complete_config(self, config: IA3Config, model_config: dict[str, Any]) -> None:
        if config.feedforward_modules is not None:
            return
        usual, targets = FEEDFORWARD_TARGETS.get(model_config.get("model_type", "")), config.target_modules
        if usual is None:
            raise ValueError("Please specify `feedforward_modules` along with `target_modules`; [] for none.")
        config.feedforward_modules = set(usual)
        if isinstance(targets, set):  # those that are among the targets, by names that files have for these too
            both = {name for name in targets if ends_with(name, usual)} | {n for n in usual if ends_with(n, targets)}
            config.feedforward_modules, config.target_modules = both, targets | both

    def layer_settings(self, config: IA3Config, key: str) -> dict[str, Any]:
        return {"is_feedforward": matching_entry(config.feedforward_modules, key) is not None}

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Adds an adapter whose vectors are the weighted sums of those of others; it is not active yet.

        An adapter that is not on a module counts there with a vector of ones, which is what it does. A call that
        raises changes nothing.

        Args:
            adapters: names of the adapters to combine. One of them at most may have `modules_to_save`, which the new
                adapter takes over as they are.
            weights: a factor for each.
            adapter_name: the new adapter's name.

        Raises:
            ValueError: an adapter does not exist, the name is taken, an adapter is on a bare parameter, or of a module
                one scales the input and another the output.
        """
        adapters, weights = check_combination(self, adapters, weights, adapter_name)
        configs = [self.configs[name] for name in adapters]
        layers: dict[Any, str] = layers_with(self, adapters)
        config = combined_config(self, adapters, layers)
        sides = {layer: {layer.scales_input[name] for name in adapters if layer.has(name)} for layer in layers}
        both = next((layers[layer] for layer, those in sides.items() if len(those) > 1), None)
        if both is not None:
            raise ValueError(
                f"Of {both!r}, some of {', '.join(adapters)} scale the input and others the output"
                " (feedforward_modules), so their vectors have no sum."
            )
        feedforward = [key for layer, key in layers.items() if sides[layer] == {True}]
        rule = joined_targets([config.feedforward_modules for config in configs])
        config.feedforward_modules = exact_targets(self.model, feedforward, [rule]) if feedforward else set()
        tensors = {}
        for layer in layers:
            vectors = layer.ia3_l
            ones = torch.ones_like(next(vectors[name] for name in adapters if name in vectors))
            here = [vectors[name].data if name in vectors else ones for name in adapters]
            tensors[layer] = {"ia3_l": task_arithmetic(here, weights)}
        add_combined(self, adapter_name, adapters, config, tensors)


class IA3Model(BaseTuner, layer=IA3Layer, method=IA3Method, prefix="ia3_"):
    """A model with (IA)^3 vectors."""
