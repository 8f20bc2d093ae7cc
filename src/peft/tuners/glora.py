"""Generalised low-rank adaptation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peft.config import LayerConfig
from peft.core.change import Add, Bias, Change
from peft.core.layer import AdapterLayer
from peft.core.method import Method
from peft.core.slots import ModuleSlot
from peft.core.tuner import BaseTuner
from peft.core.walk import in_files, layers_of
from peft.ops.hadamard import Rescaled, spread
from peft.ops.matrix import product_with
from peft.ops.starts import uniform
from peft.registry import PeftType
from peft.values import PositiveInt

#: slot of each part -> the setting that says what form it has
_PARTS = {
    "glora_A": "config_A_B", "glora_B": "config_A_B", "glora_C": "config_C", "glora_D": "config_D_E",
    "glora_E": "config_D_E",
}  # fmt: skip


@dataclass
class GloraConfig(LayerConfig, peft_type=PeftType.GLORA):
    """Generalised low-rank adaptation (arXiv:2306.07967): W' = W + W * A + B and b' = b + b * D + E + W C.

    A product with * is elementwise. Each of A to E is a product of two matrices `Xd` and `Xu` of rank r (`"lora"`), a
    `"vector"` X, a `"constant"` X, or left out (`"none"`). A vector in A or B has a value for each output, one in C a
    value for each input. A module without a bias has A and B alone.

    Args:
        r: rank of the products.
        config_A_B: the form of A and B.
        config_C: the form of C.
        config_D_E: the form of D and E.
        init_weights: start without effect; False starts all at random.
    """

    r: PositiveInt = 8
    config_A_B: Literal["lora", "vector", "constant", "none"] = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"
    init_weights: bool = True

    def check(self) -> None:
        if {self.config_A_B, self.config_C, self.config_D_E} == {"none"}:
            raise ValueError("config_A_B, config_C and config_D_E are all 'none', so there is nothing to train.")


class GloraLayer(AdapterLayer):
    """A module whose weight and bias are scaled and shifted."""

    glora_A = ModuleSlot[nn.ParameterDict]()
    glora_B = ModuleSlot[nn.ParameterDict]()
    glora_C = ModuleSlot[nn.ParameterDict]()
    glora_D = ModuleSlot[nn.ParameterDict]()
    glora_E = ModuleSlot[nn.ParameterDict]()

    def create(self, name: str, config: GloraConfig) -> None:
        for slot, shape in self.shapes().items():
            without = self.get_base_bias() is None and slot not in ("glora_A", "glora_B")
            form = "none" if without else getattr(config, _PARTS[slot])
            part = _start(form, shape, config.r, config.init_weights)
            getattr(self, slot)[name] = nn.ParameterDict({key: nn.Parameter(value) for key, value in part.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """What each part is added to, or multiplied with."""
        matrix, vector = (self.out_features, self.in_features), (self.out_features,)
        return dict(zip(_PARTS, (matrix, matrix, (self.in_features, 1), vector, vector), strict=True))

    def part(self, slot: str, name: str) -> tuple[Tensor, ...]:
        """The tensors of a part: X, or Xd and Xu; none where it is left out."""
        return tuple(getattr(self, slot)[name].values())

    def change(self, name: str) -> Iterator[Change]:
        a, b, c, d, e = (self.part(slot, name) for slot in _PARTS)
        if a:
            yield Add(Rescaled(self.original_matrix, a, b))
        if d and (bias := self.original_bias()) is not None:
            yield Bias(bias.detach() * d[0] + e[0])
        if c:
            yield Bias(self.remembered(lambda: product_with(spread(c).T, lambda: self.original_matrix().T), *c)[0])


def _start(form: str, shape: tuple[int, ...], r: int, init_weights: bool) -> dict[str, Tensor]:
    """The tensors that a part starts with."""
    if form == "none":
        return {}
    if form == "lora":
        up = uniform(r, shape[1])
        return {"Xd": torch.zeros(shape[0], r) if init_weights else uniform(shape[0], r), "Xu": up}
    if form == "constant":
        return {"X": torch.zeros(1) if init_weights else 0.02 * torch.randn(1)}
    vector = torch.zeros(shape[0], *[1] * (len(shape) - 1))
    bound = 1.0 if len(shape) == 2 else shape[0] ** -0.5
    return {"X": vector if init_weights else vector.uniform_(-bound, bound)}


class GloraMethod(Method):
    """What is left out stands in files as zeros of its full shape: huggingface/peft looks for them."""

    @classmethod
    def write_tensors(cls, model: nn.Module, adapter_name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        zeros = {
            f"{path}.{slot}.zeros": torch.zeros(shape, dtype=layer.dtype_of(adapter_name))
            for live, layer in layers_of(model, GloraLayer, adapter_name).items()
            for path in (in_files(model, adapter_name, live),)
            for slot, shape in layer.shapes().items()
            if not layer.part(slot, adapter_name)
        }
        return {**tensors, **zeros}

    @classmethod
    def read_tensors(cls, model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        endings = tuple(f"{slot}.zeros" for slot in _PARTS)
        return {key: value for key, value in tensors.items() if not key.endswith(endings)}


class GloraModel(BaseTuner, layer=GloraLayer, method=GloraMethod, prefix="glora_"):
    """A model with generalised low-rank adapters."""
