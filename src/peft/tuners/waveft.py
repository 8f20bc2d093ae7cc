"""Wavelet fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from peft.config import LayoutConfig
from peft.core.change import Add
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.plan import Plan
from peft.core.slots import FixedSlot, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.ops.sparse import Entries, check_frequencies, draw_places
from peft.ops.wavelets import Wavelets, filters
from peft.registry import PeftType
from peft.values import PositiveInt


@dataclass
class WaveFTConfig(LayoutConfig, peft_type=PeftType.WAVEFT):
    """Wavelet fine-tuning (arXiv:2505.12532): W' = W + scaling * P S Q^T, one level of an inverse wavelet transform.

    S is zero but for the trained `waveft_spectrum` [n_frequency], at random places that the seed gives.

    Args:
        n_frequency: trained coefficients of each module, at most in * out.
        scaling: factor on the change.
        wavelet_family: the wavelets: db1 (Haar) to db10, sym2 to sym10, coif1 to coif5.
        use_idwt: transform; False adds the sparse matrix itself.
        random_loc_seed: seed of the places.
        n_frequency_pattern: n_frequency of single modules: name or regular expression for its end -> number.
        proportional_parameters: share out n_frequency times the number of modules by the size of their weights.
        init_weights: start at zero, without effect; False starts at small random values.
    """

    n_frequency: PositiveInt = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    proportional_parameters: bool = False
    init_weights: bool = True

    pattern_fields: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}

    def check(self) -> None:
        filters(self.wavelet_family)  # which knows them from here on


class WaveFTLayer(AdapterLayer):
    """A module with a matrix of few wavelets added to its weight."""

    waveft_spectrum = Slot()
    waveft_indices = FixedSlot(stored=False)

    waveft_n_frequency = Setting[int]("n_frequency")
    waveft_scaling = Setting[float]("scaling")
    waveft_wavelet_family = Setting[str]("wavelet_family")
    waveft_use_idwt = Setting[bool]("use_idwt")

    def create(self, name: str, config: WaveFTConfig) -> None:
        count = self.waveft_n_frequency[name]
        start = torch.zeros(count) if config.init_weights else 0.01 * torch.randn(count)
        self.waveft_spectrum[name] = nn.Parameter(start)

    def draw(self, name: str, config: WaveFTConfig) -> None:
        self.waveft_indices[name] = draw_places(
            self.out_features, self.in_features, self.waveft_n_frequency[name], config.random_loc_seed
        )

    def change(self, name: str) -> Add:
        values, places = self.waveft_spectrum[name] * self.waveft_scaling[name], self.waveft_indices[name]
        if self.waveft_use_idwt[name]:
            family = self.waveft_wavelet_family[name]
            return Add(Wavelets(values, places, family, self.out_features, self.in_features))
        return Add(Entries.at(places, values, (self.out_features, self.in_features)))


class WaveFTMethod(Method):
    """How many coefficients each module gets."""

    def check_plan(self, plan: Plan, config: WaveFTConfig) -> None:
        counts = self.plan_settings(plan, config)
        for target in plan.targets:
            count, op = counts[target.name]["waveft_n_frequency"], target.op
            check_frequencies(count, target.name, op.out_features // op.projections, op.in_features)

    def plan_settings(self, plan: Plan, config: WaveFTConfig) -> dict[str, dict[str, Any]]:
        counts = {target.name: config.at(target.name).n_frequency for target in plan.targets}
        if config.proportional_parameters:
            sizes = {target.name: target.op.out_features * target.op.in_features for target in plan.targets}
            budget = config.n_frequency * len(sizes) / max(sum(sizes.values()), 1)
            counts = {name: max(1, round(size * budget)) for name, size in sizes.items()}
        for layer in plan.layers:  # what is said of an attention module holds for its output projection
            counts.setdefault(layer.name, counts.get(layer.name.removesuffix(".out_proj"), 0))
        return {name: {"waveft_n_frequency": count} for name, count in counts.items()}


class WaveFTModel(BaseTuner, layer=WaveFTLayer, method=WaveFTMethod, prefix="waveft_"):
    """A model with wavelet adapters."""
