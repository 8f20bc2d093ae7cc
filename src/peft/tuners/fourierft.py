"""Fourier transform fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from peft.config import LayoutConfig
from peft.core.base_op import BaseOp
from peft.core.change import Add
from peft.core.layer import AdapterLayer
from peft.core.slots import FixedSlot, Setting, Slot
from peft.core.tuner import BaseTuner
from peft.ops.fourier import Spectrum, draw_frequencies
from peft.ops.sparse import check_frequencies
from peft.registry import PeftType
from peft.values import PositiveInt


@dataclass
class FourierFTConfig(LayoutConfig, peft_type=PeftType.FOURIERFT):
    """Fourier transform fine-tuning (arXiv:2405.03003): W' = W + scaling * real(ifft2(F)).

    F [out, in] is zero but for the trained `fourierft_spectrum` [n_frequency], at random places that the seed gives.

    Args:
        n_frequency: trained entries of each module's spectrum, at most in * out.
        scaling: factor on the change.
        random_loc_seed: seed of the places.
        n_frequency_pattern: n_frequency of single modules: name or regular expression for its end -> number.
        init_weights: start at zero, without effect; False starts at random.
    """

    n_frequency: PositiveInt = 1000
    scaling: float = 150.0
    random_loc_seed: int | None = 777
    n_frequency_pattern: dict[str, int] | None = field(default_factory=dict)
    init_weights: bool = False

    pattern_fields: ClassVar[dict[str, str]] = {"n_frequency_pattern": "n_frequency"}


class FourierFTLayer(AdapterLayer):
    """A module with a matrix of few frequencies added to its weight."""

    fourierft_spectrum = Slot()
    fourierft_frequencies = FixedSlot(stored=False)

    fourierft_n_frequency = Setting[int]("n_frequency")
    fourierft_scaling = Setting[float]("scaling")

    def create(self, name: str, config: FourierFTConfig) -> None:
        count = config.n_frequency
        self.fourierft_spectrum[name] = nn.Parameter(torch.zeros(count) if config.init_weights else torch.randn(count))

    def draw(self, name: str, config: FourierFTConfig) -> None:
        self.fourierft_frequencies[name] = draw_frequencies(
            self.out_features, self.in_features, self.fourierft_n_frequency[name], config.random_loc_seed
        )

    def change(self, name: str) -> Add:
        spectrum = self.fourierft_spectrum[name]
        # There are transforms for single precision only.
        values = (spectrum if spectrum.dtype == torch.float64 else spectrum.float()) * self.fourierft_scaling[name]
        return Add(Spectrum(values, self.fourierft_frequencies[name], self.out_features, self.in_features))

    @classmethod
    def check(cls, config: FourierFTConfig, key: str, module: nn.Module, op: BaseOp) -> None:
        check_frequencies(config.n_frequency, key, op.out_features // op.projections, op.in_features)


class FourierFTModel(BaseTuner, layer=FourierFTLayer, prefix="fourierft_"):
    """A model with Fourier transform adapters."""
